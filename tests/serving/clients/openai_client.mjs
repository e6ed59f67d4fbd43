// OpenAI's own client for JavaScript.
import OpenAI from "openai";

const { url, embedder, messages, schema, tool } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const model = "tools";
const options = { model, messages, seed: 1, temperature: 0 };

const chat = await client.chat.completions.create({ ...options, max_tokens: 20 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...options, max_tokens: 20, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const form = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
const structured = await client.chat.completions.parse({ ...options, response_format: form });
const tools = [{ type: "function", function: tool }];
const called = await client.chat.completions.create({ ...options, tools, tool_choice: "required" });
const call = called.choices[0].message.tool_calls[0].function;
const stream = client.responses.stream({ model, input: messages, temperature: 0, max_output_tokens: 20 });
const response = await stream.finalResponse();
const vectors = await client.embeddings.create({ model: embedder, input: ["one", "two"] });
console.log(JSON.stringify({
  text: chat.choices[0].message.content,
  streamed,
  structured: JSON.parse(structured.choices[0].message.content),
  call: [call.name, JSON.parse(call.arguments)],
  response: response.output_text,
  embeddings: vectors.data.map((entry) => entry.embedding),
}));
