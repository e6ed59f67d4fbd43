"""GGUF files as llama.cpp's converter writes them, from tensors under Hugging Face's names.

The rules are those of llama.cpp's convert_hf_to_gguf.py: names by the table of the `gguf` package, rows of
Llama's queries and keys interleaved, 1 added to Gemma's norms, GPT-2's matrices transposed.
"""

import gguf
import numpy as np


def write_gguf(path, metadata, tensors, kinds=None, architecture="llama"):
    """Writes a GGUF file.

    Args:
        path: The file.
        metadata: Key to value, without general.architecture.
        tensors: Name in the file to float array.
        kinds: Name to the name of a quantisation type, such as "Q8_0"; float32 for the others.
        architecture: Content of general.architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, np.asarray(value).tolist())
        else:
            add.get(type(value), writer.add_string)(key, value)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        data = gguf.quants.quantize(np.ascontiguousarray(array, "float32"), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(architecture, tensors, layers, heads=None, key_value_heads=None):
    """Renames and lays out tensors of a Hugging Face checkpoint as llama.cpp's converter does."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    stored = {}
    for name, array in tensors.items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise KeyError(f"the gguf package has no name for {name}")
        if architecture in ("llama", "smollm3") and (".attn_q." in new_name or ".attn_k." in new_name):
            count = heads if ".attn_q." in new_name else key_value_heads
            halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and new_name.endswith("norm.weight"):
            array = array + 1
        if architecture == "gpt2" and ".c_" in name and name.endswith(".weight"):
            array = array.T
        stored[new_name] = array
    return stored
