"""Prompt forms on the token layouts of the families that they are for."""

import pytest
from tokenizers import processors

from etpo.engine.models.prompt_form import PromptForm, chat_message, infill_suffix
from etpo.engine.models.text_tokens import file_ids, special_ids
from etpo.envs.prompts import task_prompt
from tests.engine.models.tokenizers import FAMILIES, byte_level

STATE = task_prompt("wine", 178, 13, 3)
SUFFIX = "\n\nresult = build_model(x_train, y_train)\n"
BODY = "    from sklearn.naive_bayes import GaussianNB\n    return GaussianNB().fit(x_train, y_train)\n"
FORMS = {
    "CodeLlama": ("infill", "▁<EOT>"),
    "CodeLlama-Instruct": ("chat", "</s>"),
    "StarCoder2": ("infill", "<|endoftext|>"),
    "Qwen2.5-Coder": ("infill", "<|endoftext|>"),
    "Qwen2.5-Coder-Instruct": ("chat", "<|im_end|>"),
    "DeepSeek-Coder": ("infill", "<｜end▁of▁sentence｜>"),
    "DeepSeek-Coder-Instruct": ("chat", "<|EOT|>"),
    "Gemma-it": ("chat", "<end_of_turn>"),
    "plain": ("completion", "</s>"),
}


def raw(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_and_the_end_are_chosen_from_the_tokenizer(family):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    assert (form.name, tokenizer.convert_ids_to_tokens(form.stop_token)) == FORMS[family]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("StarCoder2", "<fim_prefix>{state}<fim_suffix>{suffix}<fim_middle>"),
        ("Qwen2.5-Coder", "<|fim_prefix|>{state}<|fim_suffix|>{suffix}<|fim_middle|>"),
        (
            "DeepSeek-Coder",
            "<｜begin▁of▁sentence｜><｜fim▁begin｜>{state}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
        ),
    ],
)
def test_infilling_puts_state_and_suffix_around_the_hole(family, layout):
    tokenizer = FAMILIES[family]()
    ids = PromptForm(tokenizer).encode(STATE, 4096)
    assert raw(tokenizer, ids) == layout.format(state=STATE, suffix=SUFFIX)


def test_code_llama_s_pieces_keep_their_own_blanks():
    tokenizer = FAMILIES["CodeLlama"]()
    tokens = tokenizer.convert_ids_to_tokens(PromptForm(tokenizer).encode(STATE, 4096))
    assert tokens[:3] == [
        "<s>",
        "▁<PRE>",
        "▁",
    ]  # the prefix has SentencePiece's leading blank, as in training
    suffix = tokens.index("▁<SUF>")
    assert tokens[suffix + 1 : suffix + 3] == ["<0x0A>", "<0x0A>"]  # the suffix has none
    assert tokens[-1] == "▁<MID>"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_writes_comes_back_with_its_indentation(family):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    # What a model draws: the tokens of the body behind a line end, then its end.
    start = ids_of(tokenizer, "\n")
    drawn = [*ids_of(tokenizer, "\n" + BODY)[len(start) :], form.stop_token]
    assert form.decode(STATE, drawn) == BODY


@pytest.mark.parametrize(
    ("family", "separator"),
    [
        ("StarCoder2", "<file_sep>"),
        ("Qwen2.5-Coder", "<|file_sep|>"),
        ("Qwen2.5-Coder", "<|repo_name|>"),
        ("Qwen2.5-Coder", "<|fim_pad|>"),
        ("DeepSeek-Coder", "<｜fim▁begin｜>"),
        ("CodeLlama", "▁<PRE>"),
    ],
)
def test_another_file_behind_the_hole_is_cut(family, separator):
    tokenizer = FAMILIES[family]()
    start = len(ids_of(tokenizer, "\n"))
    body = BODY.rstrip()
    drawn = ids_of(tokenizer, f"\n{body}{separator}.x")[start:]
    assert PromptForm(tokenizer).decode(STATE, drawn).rstrip() == body


@pytest.mark.parametrize(
    ("family", "start", "end"),
    [
        ("Qwen2.5-Coder-Instruct", "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("DeepSeek-Coder-Instruct", "<｜begin▁of▁sentence｜>You are", "\n### Response:\n"),
        ("CodeLlama-Instruct", "<s>", " [/INST]"),
        ("Gemma-it", "<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_a_chat_model_is_asked_in_its_own_template(family, start, end):
    tokenizer = FAMILIES[family]()
    ids = PromptForm(tokenizer).encode(STATE, 4096)
    text = raw(tokenizer, ids)
    assert text.startswith(start)
    assert text.endswith(end)
    assert chat_message(STATE) in text
    assert ids.count(tokenizer.bos_token_id) <= 1
    assert f"```python\n{STATE.rstrip()}\n```" in text
    assert "GridSearchCV" in text


def test_the_form_can_be_chosen_by_hand():
    qwen = FAMILIES["Qwen2.5-Coder"]()
    chat = PromptForm(qwen, "chat")
    assert (
        qwen.convert_ids_to_tokens(chat.stop_token) == "<|im_end|>"
    )  # ends a turn, though not its end token
    instruct = FAMILIES["Qwen2.5-Coder-Instruct"]()
    infill = PromptForm(instruct, "infill")
    assert instruct.convert_ids_to_tokens(infill.stop_token) == "<|endoftext|>"
    completion = PromptForm(instruct, "completion")
    assert raw(instruct, completion.encode(STATE, 4096)) == STATE
    plain = FAMILIES["plain"]()
    with pytest.raises(ValueError, match=r"--prompt-form infill: .*fill-in-the-middle"):
        PromptForm(plain, "infill")
    with pytest.raises(ValueError, match=r"--prompt-form chat: .*chat template"):
        PromptForm(plain, "chat")
    with pytest.raises(ValueError, match="got 'chatty'"):
        PromptForm(plain, "chatty")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_that_asks_for_no_function_is_given_as_it_is(family):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    ids = form.encode("row 0 column 1", 4096)
    if form.name == "chat":
        assert "row 0 column 1" in raw(tokenizer, ids)
        assert "```" not in raw(tokenizer, ids)
    else:
        assert ids == tokenizer("row 0 column 1")["input_ids"]
    start = len(ids_of(tokenizer, "\n"))
    assert form.decode("row 0 column 1", ids_of(tokenizer, "\ne.")[start:]) == "e."


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_loses_the_oldest_part_of_the_state_and_no_special_token(family):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    long = "# old\n" * 400 + STATE
    whole = form.encode(STATE, 4096)
    room = len(whole) + 30
    cut = form.encode(long, room)
    assert len(cut) <= room
    special = special_ids(tokenizer) | file_ids(tokenizer)
    if form.name != "completion":
        assert [i for i in cut if i in special] == [i for i in whole if i in special] != []
    assert STATE.splitlines()[-1] in raw(tokenizer, cut)
    assert raw(tokenizer, cut).count("# old") < 10


def test_the_bundled_model_s_prompts_are_its_training_s():
    from transformers import AutoTokenizer

    from etpo.engine.models.places import bundled_path

    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    form = PromptForm(tokenizer)
    assert form.name == "completion"
    assert form.stop_token == tokenizer.eos_token_id
    assert form.encode(STATE, 4096) == tokenizer(STATE)["input_ids"]
    assert form.encode(STATE, 40) == tokenizer(STATE)["input_ids"][-40:]
    assert STATE == (
        "# Data set wine: 178 rows, 13 features, 3 classes.\n"
        "# Write build_model: return a fitted scikit-learn classifier with predict_proba.\n"
        "def build_model(x_train, y_train):\n"
    )


def test_the_suffix_calls_the_function_with_its_parameters():
    assert infill_suffix("build_model", "x_train, y_train") == SUFFIX
    assert infill_suffix("f", "a: int = 3, b=()") == "\n\nresult = f(a, b)\n"


def ends_texts(tokenizer):
    """The tokenizer as one with add_eos_token: an end token behind every text."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    single = f"{bos} $A {eos}" if bos else f"$A {eos}"
    named = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (bos, eos) if name]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_no_end_token_stands_behind_a_prompt(family):
    tokenizer = ends_texts(FAMILIES[family]())
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    for state in (STATE, "row 0 column 1"):
        ids = PromptForm(tokenizer).encode(state, 4096)
        assert ids[-1] != tokenizer.eos_token_id
        assert PromptForm(tokenizer, "completion").encode(state, 4096)[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room", [40, 64])
def test_a_cut_prompt_keeps_its_start_token(family, room):
    tokenizer = ends_texts(FAMILIES[family]())
    ids = PromptForm(tokenizer, "completion").encode("word " * 500 + STATE, room)
    assert len(ids) == room
    assert tokenizer.bos_token_id is None or ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_spells_control_tokens_stays_text(family):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    control = special_ids(tokenizer) | file_ids(tokenizer)
    spelled = " ".join(tokenizer.convert_ids_to_tokens(sorted(control - {tokenizer.unk_token_id})))
    plain = [i for i in form.encode("# \n" + STATE, 4096) if i in control]
    ids = form.encode(f"# {spelled}\n{STATE}", 4096)
    assert [i for i in ids if i in control] == plain
    if "▁" not in spelled:  # SentencePiece writes blanks so
        assert spelled in raw(tokenizer, ids)


@pytest.mark.parametrize(
    "state", ["# old\n" * 200 + "w" * 300, "w" * 3000, "# old\n" * 400 + STATE, "row\n" * 300, "\n" * 900]
)
@pytest.mark.parametrize("family", [name for name, (form, _) in FORMS.items() if form == "chat"])
def test_a_cut_chat_keeps_its_turns(family, state):
    tokenizer = FAMILIES[family]()
    form = PromptForm(tokenizer)
    whole, room = form.encode("", 4096), len(form.encode(STATE, 4096)) + 9
    ids = form.encode(state, room)
    control = special_ids(tokenizer)
    assert len(ids) <= room
    assert [i for i in ids if i in control] == [i for i in whole if i in control]
    assert raw(tokenizer, ids).endswith(raw(tokenizer, whole)[-8:])


def test_a_context_without_room_for_the_template_is_refused():
    form = PromptForm(FAMILIES["Qwen2.5-Coder-Instruct"]())
    with pytest.raises(
        ValueError, match=r"room for a prompt of at least \d+ tokens, got 40; lower --max-new"
    ):
        form.encode(STATE, 40)


RAISES = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
TURNS = (
    "{% for m in messages %}<t>{{ m['content'] }}<e>{% endfor %}{% if add_generation_prompt %}<t>{% endif %}"
)
PARTS = TURNS.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
BROKEN = {
    "tools": "{{ tools[0].name }}" + TURNS,
    "syntax": "{% if %}",
    "no content": "<t>{% if add_generation_prompt %}<t>{% endif %}",
    "raises": "{{ raise_exception('never') }}",
}


QUESTIONS = TURNS + "{% if messages[-1]['role'] == 'assistant' %}{{ x.y.z }}{% endif %}"


@pytest.mark.parametrize("template", [RAISES + TURNS, PARTS, QUESTIONS])
def test_a_template_is_given_the_conversation_that_it_wants(template):
    tokenizer = byte_level(["<t>", "<e>"], "<e>", template=template)
    form = PromptForm(tokenizer)
    assert form.name == "chat"
    assert f"<t>{chat_message(STATE)}<e><t>" in raw(tokenizer, form.encode(STATE, 4096))


@pytest.mark.parametrize("what", BROKEN)
def test_a_template_that_cannot_be_used_is_refused_by_name_or_another_form_is_taken(what, caplog):
    tokenizer = byte_level(["<t>", "<e>"], "<e>", template=BROKEN[what])
    with pytest.raises(
        ValueError, match=r"chat template: expected .*, got .*; use --prompt-form completion"
    ) as e:
        PromptForm(tokenizer, "chat")
    assert "\n" not in str(e.value)
    form = PromptForm(tokenizer)
    assert form.name == "completion"
    assert raw(tokenizer, form.encode(STATE, 4096)) == STATE
    assert "chat template: expected" in caplog.text


def test_an_action_ends_with_every_end_that_the_model_names_and_that_is_no_text():
    tokenizer = byte_level(["<e>", "<eot>"], "<e>")
    ends = tokenizer.convert_tokens_to_ids(["<e>", "<eot>", "a"])
    assert PromptForm(tokenizer, ends=ends).stop_tokens == set(ends[:2])
    assert PromptForm(tokenizer).stop_tokens == set(ends[:1])
    chat = FAMILIES["Qwen2.5-Coder"]()
    names = chat.convert_ids_to_tokens(sorted(PromptForm(chat, "chat").stop_tokens))
    assert set(names) == {"<|endoftext|>", "<|im_end|>"}
