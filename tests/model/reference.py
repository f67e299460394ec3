"""The published forward pass, written directly from its formulas: golden notes (README), section 2.

Step follows step, nothing is shared or fused. It holds the network at sizes that no reference file has. Rows are
b*V+v everywhere; tokens are (B*V, T, S, C).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Arrays = dict[str, Tensor]


class Reference:
    """Weights and settings of one network in the layout of the reference files."""

    def __init__(self, weights: Arrays, meta: dict[str, Any]) -> None:
        self.w, self.config = weights, meta["config"]
        self.neighbours = {int(view): others for view, others in meta["mv_order_map"].items()}
        self.pad = meta.get("force_pad_h_for_sp_size") or 1

    def __call__(self, arrays: Arrays) -> Tensor:
        """The predicted velocity (B, C*V, T, H, W) of ``in/*`` arrays."""
        cond = {name.removeprefix("in/"): array.float() for name, array in arrays.items() if name.startswith("in/")}
        V, B = len(self.neighbours), len(cond["x"])
        x = cond["x"].unflatten(1, (-1, V)).transpose(1, 2).flatten(0, 1)
        T, H, W = x.shape[2:]
        x = functional.pad(x, (0, W % 2, 0, H % 2))
        h, w = x.shape[3] // 2, x.shape[4] // 2
        extra = self.pad - h % self.pad if h * w % self.pad else 0
        x, h = functional.pad(x, (0, 0, 0, 2 * extra)), h + extra

        keep = cond.get("drop_cond_mask", torch.ones(B)).bool()
        keep_frame = cond.get("drop_frame_mask", torch.ones(cond["maps"].shape[:2])).bool() & keep[:, None]
        context = self.context(cond, keep, keep_frame, V)  # B*V, T', L, C
        if context.shape[1] != T:
            context = context[:, [frame * context.shape[1] // T for frame in range(T)]]

        scale = math.sqrt(cond["height"][0] * cond["width"][0]) / 512
        position = self.position(h, w, scale)
        main = self.patches(x, "x_embedder") + position
        control = self.patches(x, "x_control_embedder") + position
        features = functional.interpolate(self.map(cond["maps"]), (T, H, W))
        features = functional.pad(features, (0, W % 2, 0, H % 2 + 2 * extra))
        control = control + self.linear(
            self.patches(features, "controlnet_cond_patchifier"), "before_proj"
        ).repeat_interleave(V, 0)

        fps = self.scalar(cond["fps"], "fps_embedder")
        noisy, clean = (self.scalar(t, "t_embedder") + fps for t in (cond["timestep"], 0 * cond["timestep"]))
        mask = cond.get("x_mask", torch.ones(B, T)).bool()

        def per_frame(a: Tensor, b: Tensor) -> Tensor:
            """(B, X) for noisy and for conditioning frames -> (B*V, T, 1, X)."""
            return torch.where(mask[..., None], a[:, None], b[:, None]).repeat_interleave(V, 0)[:, :, None]

        t6 = per_frame(*(self.linear(functional.silu(t), "t_block.1") for t in (noisy, clean)))
        for i in range(self.config["depth"]):
            for kind in ("s", "t") if self.config["with_temp_block"] else ("s",):
                main = self.block(main, f"base_blocks_{kind}.{i}", t6, context, V)
                if i < self.config["control_depth"] and not (kind == "t" and self.config["control_skip_temporal"]):
                    control = self.block(control, f"control_blocks_{kind}.{i}", t6, context, V)
                    main = main + self.linear(control, f"control_blocks_{kind}.{i}.after_proj")
        shift, scale_ = (self.w["final_layer.scale_shift_table"][i] + per_frame(noisy, noisy) for i in range(2))
        out = norm(main) * (1 + scale_) + shift
        shift, scale_ = (self.w["final_layer.scale_shift_table"][i] + per_frame(clean, clean) for i in range(2))
        is_clean = ~mask.repeat_interleave(V, 0)[:, :, None, None]
        out = torch.where(is_clean, norm(out) * (1 + scale_) + shift, out)
        out = self.linear(out, "final_layer.linear").view(B, V, T, h, w, 2, 2, -1)
        out = out.permute(0, 7, 1, 2, 3, 5, 4, 6).reshape(B, -1, T, 2 * h, 2 * w)
        return out[..., :H, :W]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        return functional.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def patches(self, x: Tensor, name: str) -> Tensor:
        out = functional.conv3d(x, self.w[f"{name}.proj.weight"], self.w[f"{name}.proj.bias"], stride=(1, 2, 2))
        return out.flatten(3).permute(0, 2, 3, 1)

    def position(self, h: int, w: int, scale: float) -> Tensor:
        C, base = self.config["hidden_size"], round(math.sqrt(h * w))
        f = 10000.0 ** (-2 * torch.arange(C // 4) / (C / 2))
        rows = []
        for i in range(h):
            for j in range(w):
                x, y = j / scale * base / w * f, i / scale * base / h * f
                rows.append(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
        return torch.stack(rows)

    def scalar(self, v: Tensor, name: str) -> Tensor:
        g = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        e = torch.cat([(v[:, None] * g).cos(), (v[:, None] * g).sin()], -1)
        return self.linear(functional.silu(self.linear(e, f"{name}.mlp.0")), f"{name}.mlp.2")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(functional.gelu(self.linear(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    def qkv(self, x: Tensor, name: str, heads: int) -> tuple[Tensor, ...]:
        """(..., n, C) -> (..., h, n, d) each; RMS norm on q and k."""
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in self.linear(x, f"{name}.qkv").chunk(3, -1)
        )
        return rms(q, self.w[f"{name}.q_norm.weight"]), rms(k, self.w[f"{name}.k_norm.weight"]), v

    def over_time(self, x: Tensor, name: str, heads: int, freqs: Tensor) -> Tensor:
        """Rotary attention over the second last dimension of (..., n, C)."""
        q, k, v = self.qkv(x, name, heads)
        return self.linear(merge(attend(rotate(q, freqs), rotate(k, freqs), v)), f"{name}.proj")

    def embedder_block(self, x: Tensor, name: str, settings: dict[str, Any]) -> Tensor:
        """(R, F, C) -> (R, T', C)."""
        b1, s1, g1, b2, s2, g2 = self.w[f"{name}.scale_shift_table"]
        x = x + g1 * self.over_time(
            norm(x) * (1 + s1) + b1, f"{name}.attn", settings["num_heads"], self.w[f"{name}.rope.freqs"]
        )
        x = x + g2 * self.mlp(norm(x) * (1 + s2) + b2, f"{name}.mlp")
        x = self.linear(x, f"{name}.final_proj")
        return halve(halve(x)) if "time_downsample_factor" in settings else x.mean(1, keepdim=True)

    def context(self, cond: Arrays, keep: Tensor, keep_frame: Tensor, V: int) -> Tensor:
        base = self.w["base_token"]
        keep_row, keep_row_frame = keep.repeat_interleave(V), keep_frame.repeat_interleave(V, 0)
        text = torch.where(keep[:, None, None], cond["y"][:, 0], self.w["y_embedder.y_embedding"])
        text = self.mlp(text, "y_embedder.y_proj")
        if "mask" in cond:
            text = text[:, : int(cond["mask"].sum(1).max()) + 1]
        camera = torch.where(keep_row[:, None, None], cond["cams"][:, 0, 0], self.w["camera_embedder.uncond_cam"])
        camera = self.linear(
            self.linear(fourier(camera.mT).flatten(1), "camera_embedder.emb2token"), "camera_embedder.after_proj"
        )
        ego = torch.where(
            keep_row_frame[..., None, None], cond["rel_pos"][:, :, 0, :3], self.w["frame_embedder.uncond_cam"]
        )
        ego = self.linear(fourier(ego.mT).flatten(2), "frame_embedder.emb2token")
        ego = self.embedder_block(ego, "frame_embedder", self.config["frame_emb_param"])
        boxes = self.boxes(cond, keep_row_frame)
        T = boxes.shape[1]
        parts = [
            (ego + base)[:, :, None],
            (camera + base)[:, None, None].expand(-1, T, -1, -1),
            text.repeat_interleave(V, 0)[:, None].expand(-1, T, -1, -1),
            boxes + base,
        ]
        return torch.cat(parts, 2)

    def boxes(self, cond: Arrays, keep: Tensor) -> Tensor:
        name, classes = "bbox_embedder", cond["bbox_classes"].long().clamp(min=0)
        kind = self.w[f"{name}._class_tokens"][classes]
        if self.config["bbox_embedder_param"]["sample_id"]:
            m, v = self.w[f"{name}.mean_var"][classes].unbind(-1)
            kind = kind + cond["bbox_box_latent"] * torch.exp(0.5 * v)[..., None] + m[..., None]
        position = fourier(cond["bbox_bboxes"]).flatten(-2)
        absent = (cond["bbox_masks"] == 0)[..., None]
        hidden = ((cond["bbox_masks"] == -1) | ((cond["bbox_masks"] == 1) & ~keep[..., None]))[..., None]
        for flag, state in ((absent, "null"), (hidden, "mask")):
            position = torch.where(flag, self.w[f"{name}.{state}_pos_feature"], position)
            kind = torch.where(flag, self.w[f"{name}.{state}_class_feature"], kind)
        x = torch.cat([functional.silu(self.linear(position, f"{name}.bbox_proj")), kind], -1)
        layers = len(self.config["bbox_embedder_param"]["proj_dims"]) - 1
        for layer in range(layers):
            x = self.linear(x, f"{name}.second_linear.{2 * layer}")
            x = functional.silu(x) if layer < layers - 1 else x
        R, _, N, _ = x.shape
        x = self.embedder_block(x.transpose(1, 2).flatten(0, 1), name, self.config["bbox_embedder_param"])
        return x.unflatten(0, (R, N)).transpose(1, 2)

    def map(self, maps: Tensor) -> Tensor:
        """(B, F, 8, rows, columns) -> (B, C, T', h, w)."""
        name = "controlnet_cond_embedder"
        x = functional.silu(self.conv(maps.flatten(0, 1), f"{name}.conv_in", padding=1))
        blocks = 2 * (len(self.config["map_embedder_param"]["block_out_channels"]) - 1)
        for block in range(blocks):
            last = block >= blocks - 2
            padding = (2, 1) if last or block % 2 else 1
            stride = 1 if block % 2 == 0 else (2, 1) if last else 2
            x = functional.silu(self.conv(x, f"{name}.blocks.{block}", padding=padding, stride=stride))
        x = self.conv(x, f"{name}.conv_out", padding=1).unflatten(0, maps.shape[:2])
        for block in (1, 3):
            x = functional.pad(halve(functional.pad(x, (1, 0, 1, 0))), (0, 1, 0, 1))
            shape = x.shape[:2]
            x = self.conv(x.flatten(0, 1), f"{name}_temp.conv_blocks.{block}.conv").unflatten(0, shape)
        return x.transpose(1, 2)

    def block(self, x: Tensor, name: str, t6: Tensor, context: Tensor, V: int) -> Tensor:
        heads = self.config["num_heads"]
        table = self.w[f"{name}.scale_shift_table"].flatten() + t6
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, -1)
        z = norm(x) * (1 + scale1) + shift1
        if "_s." in name:
            z = self.linear(merge(attend(*self.qkv(z, f"{name}.attn", heads))), f"{name}.attn.proj")
        else:
            z = self.over_time(z.transpose(1, 2), f"{name}.attn", heads, self.w["rope.freqs"]).transpose(1, 2)
        x = x + gate1 * z
        split = lambda y: y.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
        k, v = self.linear(context, f"{name}.cross_attn.kv_linear").chunk(2, -1)
        z = attend(split(self.linear(x, f"{name}.cross_attn.q_linear")), split(k), split(v))
        x = x + self.linear(merge(z), f"{name}.cross_attn.proj")
        if f"{name}.scale_shift_table_mva" in self.w:
            shift, scale, gate = (self.w[f"{name}.scale_shift_table_mva"][i] + t6[..., i : i + 1] for i in range(3))
            z = norm(x) * (1 + scale) + shift
            q, k, v = (part.unflatten(0, (-1, V)) for part in self.qkv(z, f"{name}.cross_view_attn", heads))
            views = []
            for view in range(V):
                seen = [merge(attend(q[:, view], k[:, n], v[:, n])) for n in self.neighbours[view]]
                views.append(sum(self.linear(one, f"{name}.cross_view_attn.proj") for one in seen))
            x = x + self.linear(gate * torch.stack(views, 1).flatten(0, 1), f"{name}.mva_proj")
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2, f"{name}.mlp")


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def merge(x: Tensor) -> Tensor:
    """Heads (..., h, n, d) -> (..., n, C)."""
    return x.transpose(-3, -2).flatten(-2)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * freqs
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def fourier(x: Tensor) -> Tensor:
    return torch.cat([x, *(function(f * x) for f in (1, 2, 4, 8) for function in (torch.sin, torch.cos))], -1)


def halve(x: Tensor) -> Tensor:
    """Time reduction over the second dimension: an odd first frame stays, the others become means of pairs."""
    frames = [x[:, 0]] if x.shape[1] % 2 else []
    frames += [(x[:, i] + x[:, i + 1]) / 2 for i in range(x.shape[1] % 2, x.shape[1], 2)]
    return torch.stack(frames, 1)
