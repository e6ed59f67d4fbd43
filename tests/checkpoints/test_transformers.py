"""What save_pretrained writes, transformers loads; needs the extra `reference`."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs pip install 'kerasllm[reference]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'kerasllm[reference]'")


def test_same_ids_logits_and_greedy_tokens(causal_lm, tmp_path):
    causal_lm.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = "Once upon a time there was a dog"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == causal_lm.tokenizer.encode(prompt)
    with torch.no_grad():
        np.testing.assert_allclose(causal_lm(ids.numpy()), model(ids).logits.numpy(), atol=1e-4)
    new = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = causal_lm.generate_tokens([prompt], 20)["token_ids"].numpy()[0].tolist()
    assert ours == [token for token in new if token != causal_lm.tokenizer.eos_id]


@pytest.mark.parametrize("changes", [{"use_bias": False}, {"tie_embeddings": False}], ids=str)
def test_variants(changes, tmp_path):
    from kerasllm import GPT2, CausalLM, GPT2Config

    config = {"vocabulary_size": 30, "context_length": 8, "num_layers": 2, "num_heads": 2, "dim": 8}
    ours = CausalLM(GPT2(GPT2Config(**config, **changes)))
    rng = np.random.default_rng(0)
    for weight in ours.weights:
        weight.assign(0.5 * rng.normal(size=weight.shape))
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = np.arange(8)[None]
    with torch.no_grad():
        np.testing.assert_allclose(ours(ids), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-4)
