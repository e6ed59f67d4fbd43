"""KServe's client of inference servers; its protocol v1 is TensorFlow Serving's REST API."""

import asyncio
import json
import sys

import httpx
from kserve import InferenceRESTClient, RESTConfig

asked = json.loads(sys.argv[1])


async def main():
    url, answer = f"http://{asked['rest']}", {}
    async with InferenceRESTClient(RESTConfig(protocol="v1", retries=0)) as client:
        for name, sent, received in (
            ("rows", "instances", "predictions"),
            ("columns", "inputs", "outputs"),
        ):
            body = {sent: asked["texts"]}
            texts = (await client.infer(url, body, model_name=asked["model"]))[received]
            try:
                await client.infer(url, body, model_name="nowhere")
            except httpx.HTTPStatusError as caught:
                answer[name] = {"texts": texts, "error": caught.response.json()["error"]}
    print(json.dumps(answer))


asyncio.run(main())
