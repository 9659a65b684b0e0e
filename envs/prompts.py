"""What the agent reads: the task prompt, and after a failed program the reflection prompt.

A prompt ends in the signature of `build_model`, and the action is the indented body; `prompts_forms` puts it
to models of other kinds. A state is a pure function of the data set's description and of the last failure, so
that equal states are equal strings and share one prefill.
"""

import re

SIGNATURE = "def build_model(x_train, y_train):\n"
INDENT = "    "


def task_prompt(name: str, n_rows: int, n_features: int, n_classes: int) -> str:
    """The first state of an episode.

    Args:
        name: the data set's name, as given on the command line.
        n_rows, n_features, n_classes: its size after preparation.
    """
    return (
        f"# Data set {name}: {n_rows} rows, {n_features} features, {n_classes} classes.\n"
        "# Write build_model: return a fitted scikit-learn classifier with predict_proba.\n" + SIGNATURE
    )


def reflection_prompt(task: str, body: str, error: str, signature: str = SIGNATURE) -> str:
    """The state after a failed program: what was tried, how it failed, and the signature again.

    Args:
        task: the episode's task prompt (it ends in the signature).
        body: the failed action as it was drawn.
        error: one line that says what went wrong (see `describe_error`).
        signature: the line with `def` of the function that is asked for.
    """
    failed = body if body.endswith("\n") else body + "\n"
    return f"{task}{failed}# Failed: {error}\n# Corrected:\n{signature}"


def describe_error(exception: BaseException, line: int | None, limit: int = 160) -> str:
    """One short line for the reflection prompt: where, what kind, and the message without noise.

    Args:
        exception: what the program raised.
        line: the 1-based line of the program's body that raised it, or None where it is not in the body.
        limit: most characters of the message that are kept; a longer one is cut with an ellipsis.
    """
    message = clean_message(" ".join(str(exception).split()))
    if len(message) > limit:
        message = message[: limit - 1] + "…"
    where = f"line {line}: " if line is not None else ""
    kind = type(exception).__name__
    return f"{where}{kind}: {message}" if message else f"{where}{kind}"


def clean_message(message: str) -> str:
    """A message without what says nothing of the mistake: paths, addresses, the order of sets, the data."""
    message = re.sub(r" \((/[^)]*|unknown location)\)", "", message)
    message = re.sub(r"(?:^|(?<=['\"\s=]))/(?:[\w.+-]+/)+(?=[\w.+-])", "", message)
    message = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", message)
    message = re.sub(r"array=\[[^\]]*\]?", "array=[…]", message)
    return re.sub(r"\{('[^{}]*')\}", lambda m: "{" + ", ".join(sorted(m[1].split(", "))) + "}", message)


def as_program(text: str) -> str:
    """Complete source from an action: the signature is put before a bare body, a whole program is kept.

    A body that is not indented is indented; a file that defines `build_model` itself is left alone.
    """
    if defines(text, "build_model"):
        return text
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first and not first[0].isspace():
        lines = [INDENT + line if line.strip() else line for line in lines]
    return SIGNATURE + "\n".join(lines) + "\n"


def defines(text: str, name: str) -> bool:
    """True where a text defines the function at its margin."""
    return any(line.startswith(f"def {name}(") for line in text.splitlines())
