"""Encoders as ONNX graphs, made from the jaxpr of their forward pass: what is constant is computed now.

Of JAX's primitives those are known that the encoders use at inference. Sizes are fixed but for the batch. Arrays that
only repeat others stay small where ONNX repeats them itself (element by element), so that no constant is written twice.
"""

import importlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from vivi_jax import files
from vivi_jax.errors import ConfigError

OPSET, IR_VERSION = 17, 8  # old enough for runtimes of 2022
LOWEST = np.finfo(np.float32).min
BATCH = "batch"
# The batch that is traced: a prime that no size of a network is a multiple of, so that each axis says whether it grows
# with the batch. (With a symbolic one, JAX makes gathers of strided slices.)
ANY = 7919
INLINED = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "remat"}
ELEMENTWISE = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "exp": "Exp", "erf": "Erf", "sqrt": "Sqrt", "neg": "Neg", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid",
    "stop_gradient": "Identity", "copy": "Identity",
}  # fmt: skip
# Of constants, where JAX would compile a program for each shape.
IN_NUMPY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "neg": np.negative,
    "square": np.square, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


def require_onnx() -> Any:
    """The package onnx.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        for module in ("onnx.checker", "onnx.helper", "onnx.numpy_helper"):
            importlib.import_module(module)
        return importlib.import_module("onnx")
    except ImportError:
        raise ConfigError("--format=onnx needs the package onnx: pip install onnx onnxruntime") from None


def write_onnx(
    apply: Callable[[jax.Array], dict[str, jax.Array]], shape: tuple[Any, ...], path: files.Path, about: dict[str, str]
) -> None:
    """Writes images -> {name: array} as an ONNX file with one input, "images", and outputs of these names.

    Args:
      shape: of the float32 input; its first axis is of any length.
      about: goes into the file as its metadata.

    Raises:
      ConfigError: the network has an operation that is not known here, or onnx is not installed.
    """
    onnx = require_onnx()
    images = jax.ShapeDtypeStruct((ANY, *shape[1:]), jnp.float32)
    closed, outputs = jax.make_jaxpr(apply, return_shape=True)(images)
    graph = Graph(onnx)
    source = graph.jaxpr(closed.jaxpr, closed.consts, ["images"])
    results = []
    # A dict's leaves come sorted by name.
    for name, value, var in zip(sorted(outputs), source, closed.jaxpr.outvars, strict=True):
        graph.nodes.append(onnx.helper.make_node("Identity", [graph.full(value, var.aval.shape)], [name]))
        dims = [BATCH if is_batch(d) else d for d in var.aval.shape]
        results.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    given = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [BATCH, *shape[1:]])
    made = onnx.helper.make_graph(graph.nodes, "encoder", [given], results, graph.initializers)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    files.write_bytes(pathlib.Path(path), model.SerializeToString())


def is_batch(length: int) -> bool:
    """Whether an axis of this length grows with the batch."""
    return length > 0 and length % ANY == 0


class Graph:
    """Nodes and constants of a graph while it is made.

    A value is a NumPy array, which is constant, or the name of a tensor. Either may have axes of length 1 where the
    jaxpr's array is longer, if it is the same all along them; `full` makes it as long.
    """

    def __init__(self, onnx: Any):
        self.onnx = onnx
        self.nodes: list = []
        self.initializers: list = []
        self._constants: dict[tuple, str] = {}
        self._count = 0
        self._short: set[str] = set()  # tensors that are shorter than the jaxpr's arrays

    # ---- Making nodes -----------------------------------------------------------------------------------------------

    def node(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node; returns the name of its output."""
        self._count += 1
        output = f"{kind}_{self._count}"
        names = [self.name(value) for value in inputs]
        self.nodes.append(self.onnx.helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def name(self, value: Any) -> str:
        """The name of a value; a constant is written once."""
        if isinstance(value, str):
            return value
        array = np.array(value, order="C")
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(self.onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def shape(self, shape: tuple) -> Any:
        """A shape as a tensor: the batch is -1 where no other axis depends on it."""
        dynamic = [i for i, d in enumerate(shape) if is_batch(d)]
        if len(dynamic) > 1:
            raise ConfigError(f"--format=onnx: an array of shape {shape} has two axes that depend on the batch")
        return np.array([-1 if i in dynamic else d for i, d in enumerate(shape)], np.int64)

    def full(self, value: Any, shape: tuple) -> Any:
        """The value with all axes as long as the jaxpr says."""
        if isinstance(value, np.ndarray) and not any(map(is_batch, shape)):
            return np.broadcast_to(value, shape)
        if isinstance(value, str) and value not in self._short:
            return value
        if not any(map(is_batch, shape)):
            return self.node("Expand", value, self.shape(shape))
        if any(is_batch(d) and d != ANY for d in shape):
            raise ConfigError(f"--format=onnx cannot repeat an array to the shape {shape}; use --format=stablehlo")
        batch = self.node("Shape", "images", start=0, end=1)
        parts = [batch if is_batch(d) else np.array([d]) for d in shape]
        return self.node("Expand", value, self.node("Concat", *parts, axis=0))

    # ---- Following the jaxpr ----------------------------------------------------------------------------------------

    def jaxpr(self, jaxpr: Any, consts: Any, inputs: list) -> list:
        """The values of a jaxpr's results."""
        values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Any:
            return np.asarray(var.val) if isinstance(var, core.Literal) else values[var]

        for equation in jaxpr.eqns:
            found = [read(var) for var in equation.invars]
            results = self.equation(equation, found)
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list) -> list:
        name, parameters = equation.primitive.name, equation.params
        if name in INLINED:
            inner = next(parameters[key] for key in ("jaxpr", "call_jaxpr") if key in parameters)
            closed = isinstance(inner, core.ClosedJaxpr)
            return self.jaxpr(inner.jaxpr if closed else inner, inner.consts if closed else [], inputs)
        shapes = [var.aval.shape for var in equation.invars]
        outs = [var.aval.shape for var in equation.outvars]
        if name == "broadcast_in_dim":
            return [self.broadcast(inputs[0], shapes[0], outs[0], parameters["broadcast_dimensions"])]
        fixed = not any(is_batch(d) for shape in shapes + outs for d in shape)
        if fixed and all(isinstance(value, np.ndarray) for value in inputs):
            if name in IN_NUMPY:
                return [np.asarray(IN_NUMPY[name](*inputs), equation.outvars[0].aval.dtype)]
            whole = [jnp.asarray(np.broadcast_to(v, s)) for v, s in zip(inputs, shapes, strict=True)]
            results = equation.primitive.bind(*whole, **parameters)
            return [np.asarray(r) for r in (results if equation.primitive.multiple_results else [results])]
        if name in ELEMENTWISE:
            return [self.like(self.node(ELEMENTWISE[name], *inputs), inputs)]
        if name in self.ONE_BY_ONE:
            return [self.like(self.ONE_BY_ONE[name](self, inputs[0], equation), inputs)]
        if name not in self.OF_WHOLE_ARRAYS:
            raise ConfigError(f"--format=onnx knows no {name}, which this encoder uses; use --format=stablehlo")
        # What has no elements is only ever put beside something else.
        whole = [v if 0 in shape else self.full(v, shape) for v, shape in zip(inputs, shapes, strict=True)]
        result = self.OF_WHOLE_ARRAYS[name](self, whole, equation)
        return result if isinstance(result, list) else [result]

    def like(self, result: str, inputs: list) -> str:
        """An element-wise result is short if all of its inputs are."""
        if all(isinstance(value, np.ndarray) or value in self._short for value in inputs):
            self._short.add(result)
        return result

    def broadcast(self, value: Any, shape: tuple, out: tuple, dimensions: tuple[int, ...]) -> Any:
        """Puts in axes of length 1, along which ONNX repeats where it needs to."""
        places = [i for i in range(len(out)) if i not in dimensions]
        if isinstance(value, np.ndarray):
            return np.expand_dims(value, places)
        result = self.node("Unsqueeze", value, np.array(places)) if places else self.node("Identity", value)
        same = all(out[i] == 1 for i in places) and all(shape[j] == out[i] for j, i in enumerate(dimensions))
        if value in self._short or not same:
            self._short.add(result)
        return result

    def transposed(self, value: Any, order: Any) -> Any:
        order = [int(axis) for axis in order]
        if order == sorted(order):
            return value
        return value.transpose(order) if isinstance(value, np.ndarray) else self.node("Transpose", value, perm=order)

    def reshaped(self, value: Any, shape: tuple) -> Any:
        if isinstance(value, np.ndarray):
            return value.reshape(shape)
        return self.node("Reshape", value, self.shape(shape))

    # ---- One primitive each -----------------------------------------------------------------------------------------

    def power(self, value: Any, equation: Any) -> str:
        return self.node("Pow", value, np.float32(equation.params["y"]))

    def square(self, value: Any, equation: Any) -> str:
        return self.node("Mul", value, value)

    def rsqrt(self, value: Any, equation: Any) -> str:
        return self.node("Reciprocal", self.node("Sqrt", value))

    def erfc(self, value: Any, equation: Any) -> str:
        return self.node("Sub", np.float32(1), self.node("Erf", value))

    def convert(self, value: Any, equation: Any) -> str:
        if equation.outvars[0].aval.dtype != jnp.float32:
            raise ConfigError(f"--format=onnx writes float32 only, not {equation.outvars[0].aval.dtype}")
        return self.node("Identity", value)

    def reshape(self, inputs: list, equation: Any) -> Any:
        return self.reshaped(inputs[0], equation.outvars[0].aval.shape)

    def transpose(self, inputs: list, equation: Any) -> Any:
        return self.transposed(inputs[0], equation.params["permutation"])

    def concatenate(self, inputs: list, equation: Any) -> str:
        parts = [value for value, var in zip(inputs, equation.invars, strict=True) if 0 not in var.aval.shape]
        return self.node("Concat", *parts, axis=equation.params["dimension"])

    def split(self, inputs: list, equation: Any) -> list[str]:
        axis, ends = equation.params["axis"], np.cumsum(equation.params["sizes"])
        return [
            self.node("Slice", inputs[0], np.array([end - size]), np.array([end]), np.array([axis]))
            for end, size in zip(ends, equation.params["sizes"], strict=True)
        ]

    def unstack(self, inputs: list, equation: Any) -> list[str]:
        """What jax from 0.12 on makes of `q, k, v = array`."""
        axis = equation.params["axis"]
        count = equation.invars[0].aval.shape[axis]
        return [self.node("Gather", inputs[0], np.int64(i), axis=axis) for i in range(count)]

    def slice(self, inputs: list, equation: Any) -> str:
        first, last, strides = (equation.params[name] for name in ("start_indices", "limit_indices", "strides"))
        axes = [axis for axis, limit in enumerate(last) if not is_batch(limit)]  # the batch is never cut
        parts = [[part[axis] for axis in axes] for part in (first, last, strides or (1,) * len(last))]
        return self.node("Slice", inputs[0], *map(np.array, (parts[0], parts[1], axes, parts[2])))

    def reverse(self, inputs: list, equation: Any) -> str:
        axes = np.array(equation.params["dimensions"])
        back = np.full(len(axes), -1)
        return self.node("Slice", inputs[0], back, np.full(len(axes), np.iinfo(np.int64).min), axes, back)

    def pad(self, inputs: list, equation: Any) -> str:
        low, high, between = zip(*equation.params["padding_config"], strict=True)
        if any(between) or min(*low, *high) < 0:
            raise ConfigError("--format=onnx knows no padding between elements; use --format=stablehlo")
        value = np.maximum(np.float32(inputs[1]), LOWEST).reshape(())  # for maxima the same as -inf
        return self.node("Pad", inputs[0], np.array([*low, *high]), value)

    def sum(self, inputs: list, equation: Any) -> str:
        return self.node("ReduceSum", inputs[0], np.array(equation.params["axes"]), keepdims=0)

    def maximum(self, inputs: list, equation: Any) -> str:
        return self.node("ReduceMax", inputs[0], axes=list(equation.params["axes"]), keepdims=0)

    def max_pool(self, inputs: list, equation: Any) -> str:
        parameters = equation.params
        windows, strides, pads = (parameters[key] for key in ("window_dimensions", "window_strides", "padding"))
        if len(windows) != 4 or (windows[0], windows[3]) != (1, 1) or any(pads[0] + pads[3]):
            raise ConfigError("--format=onnx pools images over rows and columns only; use --format=stablehlo")
        # Up to 1.31 onnxruntime makes a Pad of zeros and the MaxPool behind it one MaxPool padded with -inf, another
        # function where values are negative. A Max with the lowest number changes nothing and stands between the two.
        x = self.node("Max", inputs[0], LOWEST)
        (top, bottom), (left, right) = pads[1:3]
        pooled = self.node(
            "MaxPool", self.transposed(x, (0, 3, 1, 2)), kernel_shape=windows[1:3], strides=strides[1:3],
            pads=[top, left, bottom, right],
        )  # fmt: skip
        return self.transposed(pooled, (0, 2, 3, 1))

    def convolution(self, inputs: list, equation: Any) -> str:
        parameters = equation.params
        if any(d != 1 for d in parameters["lhs_dilation"]):
            raise ConfigError("--format=onnx knows no transposed convolution; use --format=stablehlo")
        numbers = parameters["dimension_numbers"]
        (low, high) = zip(*parameters["padding"], strict=True)
        y = self.node(
            "Conv", self.transposed(inputs[0], numbers.lhs_spec), self.transposed(inputs[1], numbers.rhs_spec),
            strides=parameters["window_strides"], dilations=parameters["rhs_dilation"], pads=[*low, *high],
            group=parameters["feature_group_count"],
        )  # fmt: skip
        return self.transposed(y, np.argsort(numbers.out_spec))

    def matmul(self, inputs: list, equation: Any) -> Any:
        """dot_general: either side as [*batch, rows, columns]."""
        contracted, batched = equation.params["dimension_numbers"]
        sides = []
        for i, value in enumerate(inputs):
            shape = equation.invars[i].aval.shape
            free = [axis for axis in range(len(shape)) if axis not in (*contracted[i], *batched[i])]
            groups = [free, contracted[i]] if i == 0 else [contracted[i], free]
            order = [*batched[i], *groups[0], *groups[1]]
            sizes = [math.prod(shape[axis] for axis in group) for group in groups]
            sides.append(self.reshaped(self.transposed(value, order), (*(shape[a] for a in batched[i]), *sizes)))
        return self.reshaped(self.node("MatMul", *sides), equation.outvars[0].aval.shape)

    ONE_BY_ONE = {
        "integer_pow": power, "square": square, "rsqrt": rsqrt, "erfc": erfc, "convert_element_type": convert,
    }  # fmt: skip
    OF_WHOLE_ARRAYS = {
        "reshape": reshape, "squeeze": reshape, "expand_dims": reshape, "transpose": transpose,
        "concatenate": concatenate, "unstack": unstack, "split": split, "slice": slice, "rev": reverse, "pad": pad,
        "reduce_sum": sum, "reduce_max": maximum, "reduce_window_max": max_pool,
        "conv_general_dilated": convolution, "dot_general": matmul,
    }  # fmt: skip
