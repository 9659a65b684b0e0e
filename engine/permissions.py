"""Files that others may read where the umask lets them: safetensors writes its own for their owner only."""

from pathlib import Path


def honour_umask(folder: Path) -> None:
    """Give every file of a folder the rights that a file opened for writing has."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # os.umask can only be read by setting it
    umask = int(status.partition("\nUmask:")[2].split(maxsplit=1)[0], 8)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)
