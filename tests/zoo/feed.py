"""Make inputs for any transformers model from the parameter names of its ``forward``.

for make in feeds(model):       # from the richest combination to the plainest
    model(**make(batch))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.shrink import FIRST_TEXT, VOCAB

TOKENS = 8
Feed = Callable[[int], dict[str, Any]]


def feeds(model: nn.Module) -> Iterator[Feed]:
    """Ways to make inputs, each a function of the batch size; the caller keeps one that runs."""
    known = inspect.signature(model.forward).parameters
    required = [
        n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    main = str(getattr(model, "main_input_name", "input_ids"))
    media = [n for n in ("pixel_values", "input_features", "input_values") if n in known]
    text = "input_ids" in known
    for wanted in _combinations(main, media, text):
        names = list(dict.fromkeys([*wanted, *required, *_companions(known, wanted, model)]))
        for form in _FORMS if set(wanted) & _MEDIA else _FORMS[:1]:
            yield _feed(model, [n for n in names if n in known], form)


def _combinations(main: str, media: list[str], text: bool) -> list[list[str]]:
    found = [["input_ids", *media]] if text and media else []
    found += [["input_ids", m] for m in media] if text and len(media) > 1 else []
    found += [[main]] if main != "input_ids" or text else []
    found += [["input_ids"]] if text else []
    found += [[m] for m in media]
    return [x for i, x in enumerate(found) if x not in found[:i]] or [[main]]


def _companions(known: Any, wanted: list[str], model: nn.Module) -> list[str]:
    """What usually comes along with the wanted inputs."""
    config: Any = model.config
    names = []
    if {"input_ids", "inputs"} & set(wanted):
        names += ["attention_mask", "bbox", "visual_feats", "visual_pos", "visual_embeds"]
        names += ["mm_token_type_ids", "xpath_tags_seq", "xpath_subs_seq"]
    if wanted[0] != "input_ids" and "flattened_patches" in known:
        names += ["attention_mask"]
    if "pixel_values" in wanted:
        names += ["image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes"]
        names += ["image_position_ids", "pixel_position_ids"]
    if "states" in wanted:
        names += ["actions", "rewards", "returns_to_go", "timesteps"]
    if "past_values" in wanted:
        names += ["past_time_features", "past_observed_mask", "future_values"]
        names += ["future_time_features", "static_categorical_features", "static_real_features"]
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if "decoder_input_ids" in known and (encoder_decoder or "labels" in known):
        names += ["decoder_input_ids"]
    elif "decoder_input_values" in known:
        names += ["decoder_input_values"]
    return names


# Image batches are (B, C, H, W), or frames or crops (B, T, C, H, W), or patches in a row; sound is
# a wave (B, T), or mel features (B, T, M) or (B, M, T).
_MEL_FIELDS = (
    "num_mel_bins input_feat_per_channel feature_size input_size feature_projection_input_dim "
    "mel_dim input_dim"
).split()
_MEDIA = set("pixel_values input_features input_values inputs hidden_states past_values".split())
_FORMS = ("plain", "swapped", "frames", "patches", "padded patches", "long", "features")


def _feed(model: nn.Module, names: list[str], form: str) -> Feed:
    def make(batch: int) -> dict[str, Any]:
        made = _Maker(model, batch, form)
        values = {name: made.value(name) for name in names}
        return made.with_placeholders({k: v for k, v in values.items() if v is not None})

    return make


class _Maker:
    """Makes one set of inputs."""

    def __init__(self, model: nn.Module, batch: int, form: str) -> None:
        self.model, self.batch, self.form = model, batch, form
        self.config: Any = model.config
        self.random = torch.Generator().manual_seed(batch)

    def field(self, *names: str, default: Any) -> Any:
        """The first of these fields that the config, or a config in it, has."""
        stack = [self.config]
        while stack:
            config = stack.pop(0)
            for name in names:
                value = getattr(config, name, None) if name in dir(config) else None
                if value is not None:
                    return value
            parts = [v for k, v in vars(config).items() if k.endswith("config")]
            stack += [v for v in parts if hasattr(v, "to_diff_dict")]
        return default

    def number(self, *names: str, default: int) -> int:
        value = self.field(*names, default=default)
        while isinstance(value, (list, tuple)):
            value = value[-1]
        return int(value)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def ids(self, n: int = TOKENS) -> Tensor:
        """Ordinary tokens, ended by the special one that a model may look for."""
        ids = torch.randint(FIRST_TEXT, VOCAB, (self.batch, n), generator=self.random)
        top = self.number("vocab_size", default=VOCAB)
        ids = ids % top if top < VOCAB else ids
        end = self.field("eos_token_id", default=None)
        end = end[0] if isinstance(end, (list, tuple)) else end
        if self.field("projection_dim", default=None) and isinstance(end, int):
            ids[:, -1] = end
        return ids

    def value(self, name: str) -> Any:
        """An input of this name; None if we would not know."""
        b, f = self.batch, self.number
        match name:
            case "input_ids" | "decoder_input_ids" | "inputs" if self.form != "features":
                return self.ids(TOKENS if name != "decoder_input_ids" else 5)
            case "attention_mask":
                return torch.ones(b, TOKENS, dtype=torch.long) if self.form != "features" else None
            case "pixel_values" | "inputs" | "pixel_values_videos":
                return self.pixels()
            case "input_features" | "input_values" | "audio_values" | "audio_features":
                return self.sound(name)
            case "decoder_input_values":
                return self.floats(b, 6, f("num_mel_bins", default=80))
            case (
                "hidden_states"
                | "encoder_hidden_states"
                | "query_embeds"
                | "noise_embeds"
                | "context_hidden_states"
            ):
                if "grid_thw" in inspect.signature(self.model.forward).parameters:
                    return self.pixels()
                return self.floats(b, TOKENS, f("hidden_size", default=32))
            case "inputs_embeds":
                return self.floats(b, TOKENS, f("hidden_size", "d_model", default=32))
            case "audio_mel":
                return self.sound(name)
            case "image_grid_thw" | "grid_thw" | "video_grid_thw" | "image_grid_hws":
                side = self.side()
                return torch.tensor([[1, side, side]] * b)
            case "image_sizes":
                size = f("image_size", default=32)
                return torch.tensor([[size, size]] * b)
            case "spatial_shapes":
                return torch.tensor([[4, 4]] * b)
            case "pixel_attention_mask":
                return (
                    torch.ones(b, 16, dtype=torch.long) if self.form == "padded patches" else None
                )
            case "image_position_ids" | "pixel_position_ids":
                grid = torch.stack(
                    torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1
                )
                return grid.reshape(1, 16, 2).repeat(b, 1, 1)
            case "bbox":
                corners = torch.tensor([1, 2, 5, 7])
                return corners + torch.arange(TOKENS).reshape(1, -1, 1).repeat(b, 1, 1)
            case "visual_feats" | "visual_embeds":
                width = f("visual_feat_dim", "visual_embedding_dim", default=32)
                return self.floats(b, 5, width)
            case "visual_pos":
                return self.floats(b, 5, f("visual_pos_dim", default=4)).sigmoid()
            case "flattened_patches":
                size = f("patch_size", default=16)
                rows = self.floats(b, 6, size * size * 3 + 2)
                rows[..., :2] = torch.arange(6).reshape(1, 6, 1)
                return rows
            case "past_values" | "past_observed_mask":
                return self.series(f("context_length", "history_length", default=16), name)
            case "future_values":
                return self.series(f("prediction_length", default=4), name)
            case "past_time_features" | "future_time_features":
                past = name.startswith("past")
                n = self.past_length() if past else f("prediction_length", default=4)
                return self.floats(b, n, f("num_time_features", default=1))
            case "static_categorical_features":
                n = f("num_static_categorical_features", default=0)
                return torch.zeros(b, n, dtype=torch.long) if n else None
            case "static_real_features":
                n = f("num_static_real_features", default=0)
                return self.floats(b, n) if n else None
        return self.other(name)

    def other(self, name: str) -> Any:
        b = self.batch
        if name in ("states", "actions", "rewards", "returns_to_go", "timesteps"):
            if name == "timesteps":
                return torch.arange(4).repeat(b, 1)
            dims = {"states": "state_dim", "actions": "act_dim"}
            return self.floats(b, 4, self.number(dims.get(name, "_one"), default=1))
        if name.endswith("_ids") and name != "mm_token_type_ids":
            return self.ids()
        if name.endswith("_values") or name.startswith("pixel"):
            return self.pixels()
        return None

    def past_length(self) -> int:
        lags = self.field("lags_sequence", default=[0])
        return self.number("context_length", default=16) + max(lags)

    def series(self, n: int, name: str) -> Tensor:
        if name.startswith("past") and self.field("lags_sequence", default=None):
            n = self.past_length()
        channels = self.number("num_input_channels", "input_size", default=1)
        shape = (
            (self.batch, n)
            if channels == 1 and self.form != "frames"
            else (self.batch, n, channels)
        )
        return torch.ones(shape) if "mask" in name else self.floats(*shape)

    def side(self) -> int:
        return 2 * self.number("spatial_merge_size", "merge_size", default=2)

    def pixels(self) -> Tensor:
        b = self.batch
        channels = self.number("num_channels", "in_channels", "in_chans", default=3)
        size = self.number("image_size", "img_size", "input_size", "resolution", default=64)
        patch = self.number("patch_size", default=8)
        times = self.number("temporal_patch_size", default=1)
        known = inspect.signature(self.model.forward).parameters
        if self.form == "patches" or "grid_thw" in known:
            return self.floats(b * self.side() ** 2, channels * times * patch * patch)
        if self.form == "padded patches":
            return self.floats(b, 16, channels * patch * patch)
        if self.form == "frames":
            frames = self.number("num_frames", "frames_per_clip", "num_images", default=1)
            return self.floats(b, max(frames, 1), channels, size, size)
        size = max(size, 224) if self.form == "long" else size
        return self.floats(b, channels, size, size)

    def sound(self, name: str) -> Tensor:
        mels = self.number(*_MEL_FIELDS, default=80)
        n = self.number("max_length", default=64) if name == "input_values" else 64
        n = (
            2 * self.number("max_source_positions", default=n // 2)
            if name == "input_features"
            else n
        )
        n = 640 if self.form == "long" else n
        if name == "input_values" and self.form in ("plain", "frames"):
            shape: tuple[int, ...] = (3200,) if self.form == "plain" else (1, 3200)
            return self.floats(self.batch, *shape)
        if self.form == "frames":
            return self.floats(self.batch, 1, n, mels)
        return (
            self.floats(self.batch, mels, n)
            if self.form in ("plain", "long")
            else self.floats(self.batch, n, mels)
        )

    def with_placeholders(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Put as many image or audio tokens into the text as the model makes of the media."""
        ids = inputs.get("input_ids")
        for kind, media in (("image", "pixel_values"), ("audio", "input_features")):
            token = self.field(f"{kind}_token_id", f"{kind}_token_index", default=None)
            encode = getattr(self.model, f"get_{kind}_features", None)
            if ids is None or media not in inputs or not isinstance(token, int) or encode is None:
                continue
            known = inspect.signature(encode).parameters
            with torch.no_grad():
                given = {k: v for k, v in inputs.items() if k in known and k != "input_ids"}
                features = encode(**given)
            features = getattr(features, "pooler_output", features)
            rows = [features] if isinstance(features, Tensor) else list(features)
            count = sum(r[..., 0].numel() for r in rows) // self.batch
            marks = torch.full((self.batch, count), token)
            inputs["input_ids"] = ids = torch.cat([ids[:, :1], marks, ids[:, 1:]], 1)
            inputs["attention_mask"] = torch.ones_like(ids)
        known = inspect.signature(self.model.forward).parameters
        if ids is not None and "mm_token_type_ids" in known:
            inputs["mm_token_type_ids"] = (ids == self.field("image_token_id", default=-1)).long()
        return inputs
