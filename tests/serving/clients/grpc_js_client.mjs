// gRPC's own client for JavaScript, by the descriptors of TensorFlow Serving's messages.
import fs from "node:fs";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const { grpc: address, model, version, texts, descriptors } = JSON.parse(process.argv[2]);
const form = { keepCase: true, longs: Number, enums: String };
const definition = protoLoader.loadFileDescriptorSetFromBuffer(fs.readFileSync(descriptors), form);
const { PredictionService, ModelService } = grpc.loadPackageDefinition(definition).tensorflow.serving;

function connect(Service) {
  const client = new Service(address, grpc.credentials.createInsecure());
  return (method, request, options = {}) => promisify(client[method].bind(client))(request, options);
}
const ask = connect(PredictionService);
// On the wire a map is a list of entries, and as such the descriptors show it.
const inputs = (key, tensor) => ({
  inputs: [{ key, value: { ...tensor, tensor_shape: { dim: [{ size: Object.values(tensor)[1].length }] } } }],
});
const prompt = inputs("prompt", { dtype: "DT_STRING", string_val: texts.map((text) => Buffer.from(text)) });
const seconds = inputs("seconds", { dtype: "DT_DOUBLE", double_val: [60] });
const failure = (call) => call.then(() => null, (error) => error);

const found = await ask("Predict", { model_spec: { name: model }, ...prompt });
const missing = await failure(ask("Predict", { model_spec: { name: "nowhere" }, ...prompt }));
const slow = { model_spec: { name: model, signature_name: "slow" }, ...seconds };
const late = await failure(ask("Predict", slow, { deadline: Date.now() + 300 }));
const spec = { name: model, version: { value: version } };
const status = await connect(ModelService)("GetModelStatus", { model_spec: spec });
const metadata = await ask("GetModelMetadata", { model_spec: spec, metadata_field: ["signature_def"] });
console.log(JSON.stringify({
  grpc: {
    texts: found.outputs.find((entry) => entry.key === "text").value.string_val.map(String),
    error: missing.details,
    state: status.model_version_status[0].state,
    version: metadata.model_spec.version.value,
    codes: [missing.code, late.code],
  },
}));
