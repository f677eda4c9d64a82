"""A made-up checkpoint with the names and shapes of the released graph's variables, and its heads in NumPy."""

from __future__ import annotations

import numpy as np

BLOCKS = {50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}
HEAD = "frcnn_layer_0/fast_rcnn_head"
EPS = 1e-4


def shapes(variant: str, depth: int) -> dict[str, tuple[int, ...]]:
    """Every variable of the evaluation graph, without the optimizer's."""
    found: dict[str, tuple[int, ...]] = {}

    def norm(name, width):
        found.update({f"{name}/{leaf}": (width,) for leaf in ("gamma", "beta", "moving_mean", "moving_variance")})

    def layer(name, *shape, bias=True):
        found[f"{name}/kernel"] = shape
        if bias:
            found[f"{name}/bias"] = (shape[-2] if "conv5-mask" in name else shape[-1],)

    def numbered(name, n):
        return f"{name}_{n}" if n else name

    kernels = [(7, 7, 3, 64)]
    before = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        for block in range(blocks):
            kernels += [(1, 1, before, 4 * width)] * (block == 0)
            kernels += [(1, 1, before, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            before = 4 * width
    for n, kernel in enumerate(kernels):
        layer(f"resnet{depth}/{numbered('conv2d', n)}", *kernel, bias=False)
        norm(f"resnet{depth}/{numbered('batch_normalization', n)}", kernel[-1])
    for level in range(2, 7):
        if level < 6:
            layer(f"fpn/l{level}", 1, 1, 64 * 2**level, 256)
        layer("fpn/p6" if level == 6 else f"fpn/post_hoc_d{level}", 3, 3, 256, 256)
        norm(f"fpn/p{level}-bn", 256)
        norm(f"rpn_head/rpn-l{level}-bn", 256)
        norm(f"rpn_head/rpn-l{level}-bn-1", 256)
    layer("rpn_head/rpn", 3, 3, 256, 256)
    layer("rpn_head/rpn-1", 3, 3, 256, 256)
    layer("rpn_head/rpn-class", 1, 1, 256, 3)
    layer("rpn_head/rpn-box", 1, 1, 256, 12)
    n = 0
    for branch in ("", "distill_") if variant == "ensemble" else ("",):
        for conv in range(4):
            layer(f"{HEAD}/{branch}conv_{conv}", 3, 3, 256, 256)
            norm(f"{HEAD}/{numbered('batch_normalization', n)}", 256)
            n += 1
        for fc, before in ((6, 7 * 7 * 256), (7, 1024)):
            layer(f"{HEAD}/{branch}fc{fc}", before, 1024)
            norm(f"{HEAD}/{numbered('batch_normalization', n)}", 1024)
            n += 1
        layer(f"{HEAD}/{branch.replace('_', '-')}project-to-clip", 1024, 512)
    layer(f"{HEAD}/class-predict", 512, 1203, bias=False)
    layer(f"{HEAD}/background-class-predict", 512, 1, bias=False)
    layer(f"{HEAD}/box-predict", 1024, 4)
    for n in range(5):
        layer(*(("mask_head/conv5-mask", 2, 2, 256, 256) if n == 4 else (f"mask_head/mask-conv-l{n}", 3, 3, 256, 256)))
        norm(f"mask_head/{numbered('batch_normalization', n)}", 256)
    layer("mask_head/mask_fcn_logits", 1, 1, 256, 1)
    return found


def variables(variant: str = "ensemble", depth: int = 50) -> dict[str, np.ndarray]:
    """Random values that keep the activations at 1 or so; statistics unlike those of a fresh BatchNorm."""
    rng = np.random.default_rng(0)

    def value(name, shape):
        leaf = name.split("/")[-1]
        if leaf == "moving_variance":
            return rng.uniform(0.0002, 0.002, shape) if name.startswith("rpn_head") else rng.uniform(0.6, 1.6, shape)
        if leaf == "gamma":
            return rng.uniform(0.7, 1.3, shape) * (0.03 if name.startswith("rpn_head") else 1)
        if leaf in ("beta", "moving_mean", "bias"):
            return rng.normal(0, 0.2 * (0.03 if name.startswith("rpn_head") and leaf == "moving_mean" else 1), shape)
        gain = {"rpn-box": 0.05, "box-predict": 1.0}.get(name.split("/")[-2], 2.0)
        deviation = np.float32(np.sqrt(gain / np.prod(shape[:-1])))
        return rng.standard_normal(shape, dtype=np.float32) * deviation

    arrays = {name: value(name, shape).astype(np.float32) for name, shape in shapes(variant, depth).items()}
    for name in [n for n in arrays if n.startswith("resnet") and arrays[n].shape[-1] >= 256 and n.endswith("gamma")]:
        arrays[name] *= 0.3  # or the residual sums grow
    return arrays


# The heads, in the layout of the checkpoint: [height, width, channel]


def relu(x):
    return np.maximum(x, 0)


def normalised(v, name, x, eps=EPS):
    gamma, beta, mean, variance = (v[f"{name}/{leaf}"] for leaf in ("gamma", "beta", "moving_mean", "moving_variance"))
    return (x - mean) / np.sqrt(variance + eps) * gamma + beta


def conv(v, name, x):
    kernel = v[f"{name}/kernel"]
    p = kernel.shape[0] // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((p, p), (p, p), (0, 0))), kernel.shape[:2], (0, 1))
    return np.tensordot(windows, kernel, ([3, 4, 2], [0, 1, 2])) + v[f"{name}/bias"]


def dense(v, name, x):
    return x @ v[f"{name}/kernel"] + v.get(f"{name}/bias", 0)


def rpn_head(v, x, level, eps=EPS):
    """[H, W, 256] to logits [H, W, 3] and codes [H, W, 12], anchor by anchor (dy, dx, dh, dw)."""
    x = relu(normalised(v, f"rpn_head/rpn-l{level}-bn", conv(v, "rpn_head/rpn", x), eps))
    x = relu(normalised(v, f"rpn_head/rpn-l{level}-bn-1", conv(v, "rpn_head/rpn-1", x), eps))
    return conv(v, "rpn_head/rpn-class", x), conv(v, "rpn_head/rpn-box", x)


def box_head(v, x, distill=False):
    """[7, 7, 256] to the unit embedding [512] and the code (dy, dx, dh, dw) of the main branch."""
    branch, n = ("distill_", 6) if distill else ("", 0)
    for i in range(4):
        end = f"_{n + i}" if n + i else ""
        x = relu(normalised(v, f"{HEAD}/batch_normalization{end}", conv(v, f"{HEAD}/{branch}conv_{i}", x)))
    x = x.reshape(-1)
    for i in (6, 7):
        x = relu(normalised(v, f"{HEAD}/batch_normalization_{n + i - 2}", dense(v, f"{HEAD}/{branch}fc{i}", x)))
    embedding = dense(v, f"{HEAD}/{branch.replace('_', '-')}project-to-clip", x)
    return embedding / np.linalg.norm(embedding), dense(v, f"{HEAD}/box-predict", x)


def logits(v, embedding, background=True):
    """[1204] with the background first, or [1203] without it."""
    names = ["background-class-predict", "class-predict"] if background else ["class-predict"]
    text = np.concatenate([v[f"{HEAD}/{name}/kernel"] for name in names], 1)
    return 100 * embedding @ (text / np.linalg.norm(text, axis=0))


def mask_head(v, x):
    """[14, 14, 256] to probabilities [28, 28]."""
    for i in range(4):
        end = f"_{i}" if i else ""
        x = relu(normalised(v, f"mask_head/batch_normalization{end}", conv(v, f"mask_head/mask-conv-l{i}", x)))
    x = np.einsum("hwc,ijdc->hiwjd", x, v["mask_head/conv5-mask/kernel"]).reshape(28, 28, 256)
    x = relu(normalised(v, "mask_head/batch_normalization_4", x + v["mask_head/conv5-mask/bias"]))
    return 1 / (1 + np.exp(-conv(v, "mask_head/mask_fcn_logits", x)[:, :, 0]))
