"""A TensorFlow-Serving-compatible server for one exported SavedModel.

It needs the exported folder and tensorflow, grpcio, tensorflow-serving-api, uvicorn, jinja2 and tokenizers;
the library that trained the model is neither needed nor imported. Start it with
`python -m kerasllm_serving --help`.
"""
