"""Tiny tokenizers with the special tokens, templates and layouts of real families; nothing is fetched."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}You are an AI programming assistant.\n"
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n"
    "{% else %}### Response:\n{{ m['content'] }}\n<|EOT|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level(
    special: list[str],
    eos: str,
    bos: str | None = None,
    template: str | None = None,
    plain: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """As Qwen2.5-Coder, StarCoder2 and DeepSeek-Coder have it: each byte a symbol, blanks and all."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return _wrap(tokenizer, special, eos, bos, template)


def sentencepiece(
    special: list[str], eos: str, bos: str, template: str | None = None
) -> PreTrainedTokenizerFast:
    """As CodeLlama has it: a blank put before each text and taken off again, other bytes as <0x0A>."""
    symbols = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    model = models.BPE(
        vocab={s: i for i, s in enumerate(symbols)}, merges=[], unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return _wrap(tokenizer, special, eos, bos, template)


def _wrap(
    tokenizer: Tokenizer, special: list[str], eos: str, bos: str | None, template: str | None
) -> PreTrainedTokenizerFast:
    names = list(dict.fromkeys([*([bos] if bos else []), eos, *special]))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    wrapped.chat_template = template
    return wrapped


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Added, but not as special tokens, in the families' own files.
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
              "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")  # fmt: skip
STARCODER = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>"]
DEEPSEEK_TOKENS = ["<｜end▁of▁sentence｜>", "<|EOT|>"]
DEEPSEEK_PLAIN = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<pad>", "<|User|>", "<|Assistant|>")
CODELLAMA = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]

FAMILIES = {
    "CodeLlama": lambda: sentencepiece(CODELLAMA, "</s>", "<s>"),
    "CodeLlama-Instruct": lambda: sentencepiece(CODELLAMA, "</s>", "<s>", LLAMA),
    "StarCoder2": lambda: byte_level(STARCODER, "<|endoftext|>"),
    "Qwen2.5-Coder": lambda: byte_level(QWEN, "<|endoftext|>", template=CHATML, plain=QWEN_PLAIN),
    "Qwen2.5-Coder-Instruct": lambda: byte_level(QWEN, "<|im_end|>", template=CHATML, plain=QWEN_PLAIN),
    "DeepSeek-Coder": lambda: byte_level(
        DEEPSEEK_TOKENS, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", plain=DEEPSEEK_PLAIN
    ),
    "DeepSeek-Coder-Instruct": lambda: byte_level(
        DEEPSEEK_TOKENS, "<|EOT|>", "<｜begin▁of▁sentence｜>", DEEPSEEK, DEEPSEEK_PLAIN
    ),
    "Gemma-it": lambda: byte_level(["<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>", GEMMA),
    "plain": lambda: byte_level([], "</s>", "<s>"),
}
