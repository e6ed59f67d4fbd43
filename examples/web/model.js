// Runs a folder that kerasllm's `model.export("FOLDER/model.tflite")` wrote, in the browser.

import { Tokenizer } from "@huggingface/tokenizers";
import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";

let runtime;

/**
 * Loads a model with its tokenizer.
 *
 * @param {string} folder Address of the folder.
 * @returns {Promise<Generator | Encoder>} What continues texts, or what reads whole texts.
 */
export async function loadModel(folder) {
  runtime ??= loadLiteRt(new URL("../wasm/", import.meta.resolve("@litertjs/core")).href);
  await runtime;
  // The small files first, or a missing folder would be the runtime's to explain.
  const tokenizer = [await fetchJson(`${folder}/tokenizer.json`), await fetchJson(`${folder}/tokenizer_config.json`)];
  const model = await loadAndCompile(`${folder}/model.tflite`, { accelerator: "wasm" });
  const Kind = "decode" in model.signatures ? Generator : Encoder;
  return new Kind(model, new Tokenizer(...tokenizer), await fetchJson(`${folder}/${Kind.settings}`));
}

async function fetchJson(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`A model's folder must be whole. There is no ${address}`);
  return response.json();
}

/** Calls a signature. The tensors of `inputs` are deleted: the runtime's memory is no garbage collector's. */
async function run(model, signature, inputs) {
  try {
    return await model.run(signature, inputs);
  } finally {
    for (const tensor of Object.values(inputs)) tensor.delete();
  }
}

/** Continues texts, with the likeliest token each time. */
class Generator {
  static settings = "generation_config.json";

  #cache = {};
  #decodes = [];
  #prefills = [];

  constructor(model, tokenizer, settings) {
    [this.model, this.tokenizer, this.settings] = [model, tokenizer, settings];
    this.endIds = new Set([settings.eos_token_id ?? [], settings.stop_token_ids ?? []].flat());
    for (const [name, signature] of Object.entries(model.signatures)) {
      const details = signature.getInputDetails();
      const [, , length, columns] = details.find((input) => input.name === "mask").shape;
      (name.startsWith("decode") ? this.#decodes : this.#prefills).push({ name, length, columns });
    }
    this.#decodes.sort((a, b) => a.columns - b.columns);
    this.#prefills.sort((a, b) => a.length - b.length || a.columns - b.columns);
    this.cacheLength = this.#decodes.at(-1).columns;
  }

  /** Continues a text; gives its new pieces, which hold no half characters. */
  async *stream(prompt, maxNewTokens = this.settings.max_new_tokens) {
    const ids = this.tokenizer.encode(prompt, { add_special_tokens: true }).ids;
    // With the prompt in front, for a tokenizer may drop the space that begins a text.
    const decode = () => this.tokenizer.decode(ids, { skip_special_tokens: true });
    let given = decode().length;
    for await (const id of this.generate([...ids], maxNewTokens)) {
      ids.push(id);
      const text = decode().replace(/\ufffd+$/, "");
      if (text.length > given) yield text.slice(given);
      given = Math.max(given, text.length);
    }
    yield decode().slice(given);
  }

  /** Continues ids; gives the new ones, without the one that ends a text. */
  async *generate(ids, maxNewTokens = this.settings.max_new_tokens) {
    if (ids.length < 1 || ids.length >= this.cacheLength) {
      throw new Error(`A prompt must be of 1 to ${this.cacheLength - 1} tokens. Received: ${ids.length} tokens`);
    }
    this.#clear();
    const end = Math.min(ids.length + maxNewTokens, this.cacheLength);
    await this.#prefill(ids.slice(0, -1));
    let id = ids.at(-1);
    for (let position = ids.length - 1; position < end - 1; position++) {
      id = likeliest(await this.#decode(id, position));
      if (this.endIds.has(id)) return;
      yield id;
    }
  }

  #clear() {
    for (const tensor of Object.values(this.#cache)) tensor.delete();
    const caches = this.model.signatures.decode.getInputDetails().filter(({ name }) => name.startsWith("kv_cache"));
    this.#cache = Object.fromEntries(
      caches.map(({ name, shape }) => [name, new Tensor(new Float32Array(shape.reduce((a, b) => a * b)), shape)]),
    );
  }

  async #prefill(ids) {
    for (let position = 0; position < ids.length; ) {
      const waiting = ids.length - position;
      // The shortest call that takes all that waits, or else the longest that fills up. What it writes
      // behind its real tokens is overwritten later, but must lie in the cache.
      const fitting = this.#prefills.filter(({ length, columns }) => position + length <= columns);
      const length = (fitting.find(({ length }) => length >= waiting) ?? fitting.at(-1))?.length;
      const chosen = fitting.find((call) => call.length === length); // that looks at the least of the cache
      const part = ids.slice(position, position + (chosen?.length ?? 1));
      if (chosen) await this.#call(chosen, part, position);
      else await this.#decode(part[0], position);
      position += part.length;
    }
  }

  async #decode(id, position) {
    const shortest = this.#decodes.find(({ columns }) => columns > position);
    const logits = await this.#call(shortest, [id], position);
    const scores = await logits.data();
    logits.delete();
    return scores;
  }

  async #call({ name, length, columns }, ids, position) {
    const tokens = new Int32Array(length);
    tokens.set(ids);
    const places = Int32Array.from({ length }, (_, row) => position + row);
    const { logits, ...cache } = await run(this.model, name, {
      tokens: new Tensor(tokens, [1, length]),
      input_pos: new Tensor(places, [length]),
      // Zeros hide nothing: which places a token may look at, the graph itself knows.
      mask: new Tensor(new Float32Array(length * columns), [1, 1, length, columns]),
      ...this.#cache,
    });
    this.#cache = cache;
    return logits;
  }
}

/** Reads whole texts: an embedder, a classifier of texts, or a masked model. */
class Encoder {
  static settings = "encoder.json";

  constructor(model, tokenizer, settings) {
    [this.model, this.tokenizer, this.settings] = [model, tokenizer, settings];
  }

  /** Computes the model's outputs for a text; gives them by name, as typed arrays. */
  async encode(text) {
    const { lengths, max_length, padding_id, prompt = "" } = this.settings;
    const ids = this.tokenizer.encode(prompt + text, { add_special_tokens: true }).ids;
    const most = Math.min(Math.max(...lengths), max_length ?? Infinity);
    if (ids.length < 1 || ids.length > most) {
      throw new Error(`A text must be of 1 to ${most} tokens. Received: ${ids.length} tokens`);
    }
    const length = Math.min(...lengths.filter((length) => length >= ids.length));
    const filled = {
      token_ids: new Int32Array(length).fill(padding_id),
      attention_mask: new Int32Array(length).fill(1, 0, ids.length),
      token_type_ids: new Int32Array(length), // one text is of one type
    };
    filled.token_ids.set(ids);
    const signature = `encode_${length}`;
    const names = this.model.signatures[signature].getInputDetails().map(({ name }) => name);
    const outputs = await run(
      this.model,
      signature,
      Object.fromEntries(names.map((name) => [name, new Tensor(filled[name], [1, length])])),
    );
    const arrays = {};
    for (const [name, tensor] of Object.entries(outputs)) {
      arrays[name] = (await tensor.data()).slice();
      tensor.delete();
    }
    return arrays;
  }
}

function likeliest(scores) {
  return scores.reduce((best, score, index) => (score > scores[best] ? index : best), 0);
}
