"""What a model's files are, in one number: a run knows its base by more than its path."""

import hashlib
from pathlib import Path

MIB = 2**20
WHOLE_BELOW = 256 * MIB
STRIDE = 16 * MIB


def digest_of_base(name: str) -> str | None:
    """SHA-256 over the weight and tokenizer files of a model folder, or of a hub name's files here.

    Of a file over 256 MiB its size, its first MiB and one MiB in sixteen count: training moves every tensor,
    and a 7B model is not read twice for it. None where no files are found.
    """
    folder = _folder_of(name)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]) if folder else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            whole = file.stat().st_size < WHOLE_BELOW
            while block := opened.read(MIB):
                digest.update(block)
                if not whole:
                    opened.seek(STRIDE - MIB, 1)
    return digest.hexdigest()


def _folder_of(name: str) -> Path | None:
    from etpo.engine.models.places import model_path

    path = model_path(name)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None
