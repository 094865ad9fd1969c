"""Name the weight and the bias of a projection, and check that it is ``x W + b`` and no more."""

from __future__ import annotations

from torch import Tensor, fx, nn

from surgery.patterns.dataflow import op_name, value
from surgery.patterns.projection import Projection, every_position, features_last, is_weight
from surgery.plugin import as_matrix


def bias_of(proj: Projection, root: nn.Module) -> str | fx.Node | None:
    """Return the bias that a projection adds, None if there is none.

    Returns:
        the name of a parameter of a module, or the node of a bias that the forward uses itself.
    """
    if proj.module:
        bias = getattr(root.get_submodule(proj.module), "bias", None)
        plain = isinstance(bias, Tensor) and bias.shape == (proj.width,)
        return f"{proj.module}.bias" if plain else None
    name, args = op_name(proj.node), proj.node.args
    found: object = None
    if name in ("linear", "conv1d", "conv2d", "conv3d"):
        found = args[2] if len(args) > 2 else proj.node.kwargs.get("bias")
    elif name == "addmm":
        found = args[0]
    return found if isinstance(found, fx.Node) and is_weight(found) else None


def weight_of(proj: Projection, root: nn.Module) -> tuple[str, bool]:
    """Return the name of a projection's matrix, and whether that is (out, in).

    The name is empty unless the projection is ``x W + b`` with one floating-point matrix W. The
    shape of a matrix does not show this: a module may scale its output, or add a low-rank update,
    and a square matrix may be used either way. So up to 16 features of one token are computed again
    in float64 and compared with the example's output. On the meta device only the shape counts.
    """
    axes = (3, 4, 5) if proj.channels_first else (2,)
    if proj.module:
        own = root.get_submodule(proj.module).named_parameters(recurse=False)
        names = [f"{proj.module}.{name}" for name, p in own if p.dim() in axes]
    else:
        weights = [n for n in proj.node.all_input_nodes if n.op == "get_attr"]
        names = [str(n.target) for n in weights if value(n).dim() in axes]
    widths = (proj.in_width, proj.width)
    if len(names) != 1 or proj.in_axes != 1 or proj.axes != 1:
        return "", False
    weight = as_matrix(_attribute(root, names[0]))
    fits = [t for t in (False, True) if tuple(weight.shape)[:: -1 if t else 1] == widths]
    plain = type(weight) in (Tensor, nn.Parameter)  # a quantised one may have no product of its own
    if not plain or not weight.is_floating_point() or not fits:
        return "", False
    x, y = every_position(value(proj.source), proj.strides), value(proj.node)
    if x.is_meta:  # no values: only a matrix that is not square is clear
        return (names[0], fits[0]) if len(fits) == 1 else ("", False)
    if weight.device != x.device or not x.numel():
        return "", False
    bias = bias_of(proj, root)
    shift = _attribute(root, bias) if isinstance(bias, str) else value(bias) if bias else None
    bound = 0.05 if y.dtype.itemsize == 2 else 5e-3  # bfloat16, TF32
    x, y = (features_last(v.detach(), proj.channels_first).flatten(0, -2)[0] for v in (x, y))
    x, y = x.double(), y.double()
    some = slice(0, 16)  # the first features
    added = 0.0 if shift is None else shift.detach()[some].double()
    for transposed in fits:
        matrix = (weight[some].T if transposed else weight[:, some]).detach().double()
        gap = (x @ matrix + added - y[some]).abs().max()
        if gap <= bound * y[some].abs().max().clamp(min=1e-6):
            return names[0], transposed
    return "", False


def _attribute(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name; a parametrized one is computed."""
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(root.get_submodule(owner), last)
    return found
