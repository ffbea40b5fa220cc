"""`load_whisper`: a preset, a CTranslate2 model.bin or folder, or a Hugging Face folder -> `Whisper`. Never a pickle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError, nearest
from tokeff.models.config import Precision
from tokeff.models.ct2_file import Ct2Tensors
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf import SafeTensors, weight_files
from tokeff.models.hf_config import MAX_LAYERS
from tokeff.models.layout import Source
from tokeff.models.load import preset_file
from tokeff.models.presets import SPEECH
from tokeff.models.tokenizer import Tokenizer, read_tokenizer
from tokeff.models.vit_config import ViTBlock
from tokeff.models.whisper_config import CrossAttention, DecoderBlock, WhisperConfig, WhisperParams

Leaf = Callable[[str, tuple[int, ...], tuple[int, ...]], Any]  # (name in the file, shape there, shape of ours) -> what stands in the tree


@dataclass(frozen=True, eq=False)
class Whisper:
    """A speech model ready to run. `tokenizer` is None for a folder without tokenizer.json."""

    cfg: WhisperConfig
    params: WhisperParams
    tokenizer: Tokenizer | None
    name: str

    @property
    def tok(self) -> Tokenizer:
        """The tokenizer; UserError for a model that came without one."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer; put tokenizer.json in its folder, or work with token ids")
        return self.tokenizer

    def __repr__(self) -> str:
        return f"Whisper({self.name!r}, {self.cfg.L} + {self.cfg.layers} layers)"


def load_whisper(source: str | Path = "whisper-tiny.en", precision: Precision | None = None, language: str = "en") -> Whisper:
    """Load a Whisper model, fetched first where it is a preset that the cache lacks. language: of a multilingual model's transcripts.

    Raises UserError, one line, for whatever cannot be loaded.
    """
    precision = precision or Precision.default()
    path = preset_file(str(source)).parent if source in SPEECH else Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    name = folder.resolve().name
    if not path.exists():
        raise UserError(f"no speech model named {str(source)[:80]!r} and no such file or folder; {nearest(str(source), SPEECH)}")
    if path.is_file() and path.suffix != ".bin":
        raise UserError(f"{path} is one file of a model; give its folder")
    converted = path if path.is_file() else folder / "model.bin"
    if converted.is_file():
        tensors: Source = Ct2Tensors(converted)
        cfg = _ct2_config(tensors, folder, name)
    else:
        cfg = _hf_config(folder, name)
        tensors = SafeTensors(weight_files(folder))
    params = _params(tensors, cfg, precision)
    tokenizer = read_tokenizer(folder, cfg.V)
    return Whisper(cfg if tokenizer is None else _with_tokens(cfg, tokenizer, language), params, tokenizer, name)


def build(cfg: WhisperConfig, leaf: Leaf) -> WhisperParams:
    """The tree of a model, each array by `leaf`."""
    c = cfg
    wide, heads = (c.D, c.D), (c.N, c.H, c.D)

    def whole(name: str, *shape: int) -> Any:
        return leaf(f"model.{name}", shape, shape)

    def norm(name: str) -> tuple[Any, Any]:
        return whole(f"{name}.weight", c.D), whole(f"{name}.bias", c.D)

    def attention(at: str, kind: str) -> dict[str, Any]:
        weight, bias = norm(f"{at}.{kind}_layer_norm")
        made = {"attn_norm_D": weight, "attn_norm_bias_D": bias}
        made |= {f"{x}_NHD": leaf(f"model.{at}.{kind}.{x}_proj.weight", wide, heads) for x in "qkv"}
        made |= {f"{x}_bias_NH": leaf(f"model.{at}.{kind}.{x}_proj.bias", (c.D,), (c.N, c.H)) for x in "qv"}
        made["o_DNH"] = leaf(f"model.{at}.{kind}.out_proj.weight", wide, (c.D, c.N, c.H))
        return made | {"o_bias_D": whole(f"{at}.{kind}.out_proj.bias", c.D)}

    def block(at: str) -> ViTBlock:
        weight, bias = norm(f"{at}.final_layer_norm")
        up, up_bias = whole(f"{at}.fc1.weight", c.F, c.D), whole(f"{at}.fc1.bias", c.F)
        down, down_bias = whole(f"{at}.fc2.weight", c.D, c.F), whole(f"{at}.fc2.bias", c.D)
        feed = {"up_FD": up, "up_bias_F": up_bias, "down_DF": down, "down_bias_D": down_bias}
        return ViTBlock(**attention(at, "self_attn"), ffn_norm_D=weight, ffn_norm_bias_D=bias, **feed)

    def decoder_block(at: str) -> DecoderBlock:
        return DecoderBlock(block(at), CrossAttention(**attention(at, "encoder_attn")))

    return WhisperParams(
        whole("encoder.conv1.weight", c.D, c.I, 3),
        whole("encoder.conv1.bias", c.D),
        whole("encoder.conv2.weight", c.D, c.D, 3),
        whole("encoder.conv2.bias", c.D),
        whole("encoder.embed_positions.weight", c.S, c.D),
        tuple(block(f"encoder.layers.{i}") for i in range(c.L)),
        *norm("encoder.layer_norm"),
        whole("decoder.embed_tokens.weight", c.V, c.D),
        whole("decoder.embed_positions.weight", c.max_len, c.D),
        tuple(decoder_block(f"decoder.layers.{i}") for i in range(c.layers)),
        *norm("decoder.layer_norm"),
    )


def _params(source: Source, cfg: WhisperConfig, precision: Precision) -> WhisperParams:
    """Every shape is compared with the file's header before any tensor is read."""
    known = {"proj_out.weight"}

    def check(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
        found = source.shapes.get(name)
        if found is None:
            raise UserError(f"{source.where}: tensor {name} is missing; the file is incomplete or its config wrong")
        if found != stored:
            raise UserError(f"{source.where}: tensor {name} has shape {found}, the model needs {stored}")
        known.add(name)

    def read(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        plain = len(stored) == 1 or "embed_positions" in name  # norms, biases and positions stay float32
        return jnp.array(np.asarray(source.read(name), np.float32).reshape(shape), "float32" if plain else precision.weights)

    build(cfg, check)
    extra = sorted(set(source.shapes) - known)
    if extra:
        raise UserError(f"{source.where}: {len(extra)} tensors have no place in this model, {extra[0][:80]} first")
    return build(cfg, read)


def _ct2_config(t: Ct2Tensors, folder: Path, name: str) -> WhisperConfig:
    def sizes(tensor: str, axes: int) -> tuple[int, ...]:
        shape = t.shapes.get(f"model.{tensor}", ())
        if len(shape) != axes:
            raise UserError(f"{t.where}: tensor {tensor} is missing or has {len(shape)} axes; it is not a whole Whisper model")
        return shape

    def layers(side: str) -> int:
        return sum(n.startswith(f"model.{side}.layers.") and n.endswith(".fc1.weight") for n in t.shapes)

    (V, D), (S, _) = sizes("decoder.embed_tokens.weight", 2), sizes("encoder.embed_positions.weight", 2)
    places = sizes("decoder.embed_positions.weight", 2)[0]
    _, bands, _ = sizes("encoder.conv1.weight", 3)
    heads = {t.numbers.get(f"{side}/num_heads", 0) for side in ("encoder", "decoder")}
    N = max(heads)
    if len(heads) != 1 or N < 1 or D % N:
        raise UserError(f"{t.where}: {sorted(heads)} heads for a width of {D} are not supported; convert the model again")
    F = sizes("encoder.layers.0.fc1.weight", 2)[0]
    cfg = WhisperConfig(name, V, D, F, layers("encoder"), layers("decoder"), N, bands, S, places)
    table = folder / "config.json"
    f = Fields(read_json(table) if table.is_file() else {}, str(table))
    return replace(cfg, never=_tokens(f, "suppress_ids", V), never_first=_tokens(f, "suppress_ids_begin", V))


def _hf_config(folder: Path, name: str) -> WhisperConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has neither model.bin nor config.json; give a folder with a Whisper model")
    f = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    if f.word("model_type", "") != "whisper":
        raise UserError(f"{f.where} is of a {f.word('model_type', 'nameless')[:40]!r} model; load_whisper reads 'whisper' alone")
    if f.word("activation_function", "gelu") != "gelu" or f.flag("scale_embedding", False):
        raise UserError(f"{f.where}: another activation than gelu, or scaled embeddings, are not supported")
    (N, n), (F, g) = (
        [f.whole(f"{side}_{what}") for side in ("encoder", "decoder")] for what in ("attention_heads", "ffn_dim")
    )
    D = f.whole("d_model")
    if (n, g) != (N, F) or D % N:
        raise UserError(f"{f.where}: encoder and decoder differ in heads or feed-forward, or {D} does not divide over {N} heads")
    more = folder / "generation_config.json"
    generation = Fields({**f.values, **(read_json(more) if more.is_file() else {})}, str(more))
    V = f.whole("vocab_size")
    return WhisperConfig(
        name, V, D, F, f.whole("encoder_layers", high=MAX_LAYERS), f.whole("decoder_layers", high=MAX_LAYERS), N,
        f.whole("num_mel_bins"), f.whole("max_source_positions"), f.whole("max_target_positions"),
        eos=f.whole("eos_token_id", 50256, low=0),
        start=(f.whole("decoder_start_token_id", 50257, low=0),),
        never=_tokens(generation, "suppress_tokens", V), never_first=_tokens(generation, "begin_suppress_tokens", V),
    )  # fmt: skip


def _tokens(f: Fields, key: str, V: int) -> tuple[int, ...]:
    """A list of token ids of any length, none where there is none. -1 stands for a default that only transformers knows, and is skipped."""
    value = f.get(key, [])
    if not isinstance(value, list) or len(value) > V or not all(type(i) is int and -1 <= i < V for i in value):
        raise f.fail(key, f"a list of token ids below {V}")
    return tuple(i for i in value if i >= 0)


def _with_tokens(cfg: WhisperConfig, tokenizer: Tokenizer, language: str) -> WhisperConfig:
    """The config with the control tokens that its tokenizer has: start, language and task (of a multilingual model), no timestamps."""
    multilingual = cfg.V > 51_864
    words = ["<|startoftranscript|>", *([f"<|{language}|>", "<|transcribe|>"] if multilingual else []), "<|notimestamps|>"]
    ids = [tokenizer.raw.token_to_id(word) for word in (*words, "<|endoftext|>")]
    missing = [word for word, i in zip((*words, "<|endoftext|>"), ids) if i is None or i >= cfg.V]
    if missing:
        raise UserError(f"the tokenizer of {cfg.name} has no {missing[0]}; give another language, or the model's own tokenizer.json")
    return replace(cfg, start=tuple(ids[:-1]), eos=ids[-1])
