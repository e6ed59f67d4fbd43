"""How weights, optimizer and batches are divided among devices, on the JAX backend.

Devices are a table of `data` rows and `tensor` columns. The batch is divided among the rows; the matrices
of each layer, among the columns (Shoeybi et al.: "Megatron-LM", 2019); and, if wanted, the optimizer or the
weights as well among the rows (Rajbhandari et al.: "ZeRO", 2020). Results are those of one device: JAX adds
the communication.
"""

from collections.abc import Sequence

import keras

from kerasllm.layers import MultiHeadAttention

# What is divided among the rows of devices, besides the batch.
SHARDS = ("nothing", "optimizer", "weights")

# By the role of a weight in the layers that all families are made of, the devices that its axes are divided
# among. Keras wants the whole path to match, and a weight of several axes that none matches is refused.
_ROLES = {
    # A column of devices has some of the heads, of the wide layer and of the vocabulary, …
    r".*/(query|key|value|up|gate|head|head_dense|classifier_dense)/kernel": ("data", "tensor"),
    r".*/(query|key|value|up|gate)/bias": ("tensor",),
    r".*_position_bias/embeddings": (None, "tensor"),
    # … and what they give is summed over the columns.
    r".*/(output|down)/kernel": ("tensor", "data"),
    r".*/(token_embedding|head)/embeddings": ("tensor", "data"),
    r".*/head_bias": ("tensor",),
    r".*/(position|token_type)_embedding/embeddings": (None, "data"),
    r".*/classifier/kernel": ("data", None),
}


class Layouts(keras.distribution.ModelParallel):
    """The layouts of a model's weights, its optimizer's slots and its batches; see `make_distribution`.

    Args:
        mesh: The devices, `[data, tensor]`.
        shard: One of `SHARDS`.
    """

    def __init__(self, mesh: keras.distribution.DeviceMesh, shard: str):
        super().__init__(layout_map=_layout_map(mesh, shard == "weights"), batch_dim_name="data")
        self._slots = _layout_map(mesh, shard != "nothing")

    def get_data_layout(self, data_shape):
        """Returns the layout of an array of a batch; Keras calls it."""
        if data_shape[0] % self.num_model_replicas:
            raise ValueError(
                "The rows of a batch must be a multiple of the devices that they are divided among. "
                f"Received: {data_shape[0]} rows, data={self.num_model_replicas}"
            )
        return super().get_data_layout(data_shape)

    def get_variable_layout(self, variable):
        """Returns the layout of a variable; Keras calls it."""
        if getattr(variable, "_layout", None) is not None:
            return variable._layout
        return self._find(self._layout_map, variable)

    def slot_layout(self, variable) -> keras.distribution.TensorLayout:
        """Returns the layout of what an optimizer keeps of a weight."""
        return self._find(self._slots, variable)

    def get_tensor_layout(self, path):
        """Returns None: what is computed is laid out by JAX; Keras calls it."""
        return None

    def _find(self, layouts, variable):
        layout = layouts[variable.path]
        if layout is None:
            if variable.trainable and len(variable.shape) > 1:
                raise ValueError(
                    "A weight must have a layout, or each device would hold all of it. "
                    f"Received: {variable.path} of shape {tuple(variable.shape)}"
                )
            return keras.distribution.TensorLayout([None] * len(variable.shape), self.device_mesh)
        sizes = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
        for size, axis in zip(variable.shape, layout.axes, strict=True):
            if axis is not None and size % sizes[axis]:
                raise ValueError(
                    "Every size of a weight must be a multiple of the devices that it is divided among. "
                    f"Received: {variable.path} of shape {tuple(variable.shape)}, {axis}={sizes[axis]}"
                )
        return layout


def make_distribution(
    data: int | None = None,
    tensor: int = 1,
    shard: str = "nothing",
    devices: Sequence[str] | None = None,
) -> Layouts:
    """Makes a distribution for any of the models; JAX backend only.

    The model is made or loaded, compiled and trained under it:

    ```python
    keras.distribution.set_distribution(make_distribution(data=4, tensor=2, shard="weights"))
    model = kerasllm.CausalLM.from_pretrained("…")
    model.compile()
    model.fit(texts)
    ```

    Args:
        data: Number of devices, or groups of `tensor` devices, that the rows of a batch are divided among.
            None: as many as there are.
        tensor: Number of devices that the heads, the wide layers and the vocabulary are divided among, so
            it must divide their numbers.
        shard: What is divided among the `data` as well: `"nothing"` (data parallel), the `"optimizer"`
            (ZeRO-1) or the `"weights"` and the optimizer (fully sharded); they must divide `dim`.
        devices: Names as `keras.distribution.list_devices()` gives them; None: all.

    Returns:
        The distribution.

    Raises:
        ValueError: If an argument is out of range, or on another backend. A model that cannot be divided
            so raises when it is made or compiled.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            "Layouts need the JAX backend (KERAS_BACKEND=jax); on TensorFlow use `make_strategy`. "
            f"Received: {keras.backend.backend()}"
        )
    if shard not in SHARDS:
        raise ValueError(f"`shard` must be one of {SHARDS}. Received: shard={shard!r}")
    devices = list(keras.distribution.list_devices() if devices is None else devices)
    if tensor < 1 or (data is None and len(devices) % tensor):
        raise ValueError(
            f"`tensor` must divide the number of devices, {len(devices)}. Received: tensor={tensor}"
        )
    data = len(devices) // tensor if data is None else data
    if data < 1 or data * tensor != len(devices):
        raise ValueError(
            f"`data` times `tensor` must be the number of devices, {len(devices)}. "
            f"Received: data={data}, tensor={tensor}"
        )
    mesh = keras.distribution.DeviceMesh((data, tensor), ("data", "tensor"), devices)
    return Layouts(mesh, shard)


def check_layouts(model) -> None:
    """Refuses a model that the current distribution does not fit.

    Args:
        model: A built model.

    Raises:
        ValueError: If the model was made under another distribution or none, or its heads cannot be
            divided.
    """
    distribution = keras.distribution.distribution()
    mesh = getattr(distribution, "device_mesh", None)
    for variable in model.variables:
        if getattr(variable._layout, "device_mesh", None) is not mesh:
            raise ValueError(
                "A model must be made, compiled and trained under the same distribution. "
                f"Received: {variable.path} with the layout {variable._layout}, distribution={distribution}"
            )
    if not isinstance(distribution, Layouts):
        return
    tensor = distribution.device_mesh.shape[1]
    for layer in model._flatten_layers():
        # Keys and values have no more heads than the queries, and their number divides that of those.
        if isinstance(layer, MultiHeadAttention) and layer.num_kv_heads % tensor:
            raise ValueError(
                "The heads must be a multiple of the devices that they are divided among. Received: "
                f"num_heads={layer.num_heads}, num_kv_heads={layer.num_kv_heads}, tensor={tensor}"
            )


def _layout_map(mesh, is_sharded: bool) -> keras.distribution.LayoutMap:
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, axes in _ROLES.items():
        layouts[pattern] = tuple(axis if is_sharded or axis != "data" else None for axis in axes)
    return layouts
