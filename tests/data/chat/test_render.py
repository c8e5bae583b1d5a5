"""Which tokens of a conversation are learnt."""

import numpy as np
import pytest

from llmtrain.data.chat.render import Renderer
from llmtrain.data.chat.template import CHATML, ChatTemplate, find_template
from llmtrain.data.errors import DataError
from llmtrain.data.tokenizer import load

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # as Qwen3's: an answer's thoughts are left out once another message follows; the prompt of an answer has none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*contents: str, system: str | None = None) -> list[dict]:
    """Contents of a user and an assistant in turns."""
    turns = [{"role": "assistant" if n % 2 else "user", "content": c} for n, c in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


TALKS = [
    talk("What is 4 + 5?", "It is 9."),
    talk("Good night", " \n\n good\n", "my lord?", "  Queen, é 中文 🙂 .", system="You are a queen."),
    talk("a", "b", "c", "d", "e", "f"),
]


def learnt(rendered, tokenizer) -> list[str]:
    """The text of each run of learnt tokens, special tokens included."""
    runs, before = [], False
    for token, counts in zip(rendered.tokens.tolist(), rendered.answer.tolist()):
        if counts:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = counts
    return [tokenizer._model.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["chatml", "marked"])
def test_answers_and_the_ends_of_their_turns_count(messages, source, tokenizer):
    rendered = Renderer(ChatTemplate(source, {}, name="x"), tokenizer)(messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learnt(rendered, tokenizer) == [f"{answer}<|im_end|>" for answer in answers]
    assert [rendered.text[a:b] for a, b in rendered.spans] == [f"{answer}<|im_end|>" for answer in answers]
    assert tokenizer._model.decode(rendered.tokens.tolist(), skip_special_tokens=False) == rendered.text


@pytest.mark.parametrize("messages", TALKS)
def test_the_mask_is_that_of_transformers(messages, folder, tokenizer):
    pytest.importorskip("transformers", reason="its mask is the standard")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    for source in (MARKED, CHATML):  # found or marked, it is the same
        rendered = Renderer(ChatTemplate(source, {}, name="x"), tokenizer)(messages)
        if rendered.tokens.tolist() == theirs["input_ids"]:
            assert rendered.answer.astype(int).tolist() == theirs["assistant_masks"]
        else:  # an answer that begins with a newline is cut from the newline before it
            assert any(m["content"].startswith(" \n") for m in messages)


@pytest.mark.parametrize("messages", TALKS)
def test_training_sees_the_prompt_that_generation_gives(messages, tokenizer):
    template = ChatTemplate(CHATML, {}, name="x")
    rendered = Renderer(template, tokenizer)(messages)
    prompt = tokenizer.encode_marked(template.render(messages[:-1], answer_follows=True))
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    assert rendered.answer[len(prompt)] and not rendered.answer[len(prompt) - 1]


def test_a_token_that_would_join_prompt_and_answer_is_cut(tokenizer):
    """`4 + ` and `5`: the space and the digit are one token in a row, two for a model that answers."""
    joined = tokenizer.encode("What is 4 + 5?")
    for prompt, answer in (("What is 4 +", " 5?"), ("What is 4 + ", "5?"), ("What is 4 + 5", "?")):
        rendered = Renderer(find_template("plain", tokenizer), tokenizer)(talk(prompt, answer))
        before = tokenizer.encode(prompt)
        assert rendered.tokens.tolist()[: len(before)] == before
        assert learnt(rendered, tokenizer) == [f"{answer}<|im_end|>"]
    assert tokenizer.encode("What is 4 + ") != joined[: len(tokenizer.encode("What is 4 + "))]


def test_a_template_that_forgets_is_understood_by_its_contents(tokenizer):
    rendered = Renderer(ChatTemplate(FORGETFUL, {}, name="x"), tokenizer)(talk("a", "b", "c", "d"))
    assert learnt(rendered, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
    assert "<think>" in rendered.text


def test_answers_that_cannot_be_found_are_refused(tokenizer):
    source = "{% for m in messages %}{{ m.content | upper if loop.last else m.content | length }} {% endfor %}"
    with pytest.raises(DataError, match="generation"):
        Renderer(ChatTemplate(source, {}, name="x"), tokenizer)(talk("a", "bc", "d", "e"))


def test_special_tokens_in_a_message_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"message 0 holds '<\|im_end\|>'"):
        Renderer(find_template("chatml", tokenizer), tokenizer)(talk("a<|im_end|>b", "c"))


def test_sentencepiece_gets_its_special_tokens(tmp_path):
    from llmtrain.data.train_tokenizer import train_sentencepiece

    (tmp_path / "t.txt").write_text("The king said good night to the queen.\n" * 50)
    path = train_sentencepiece([str(tmp_path / "t.txt")], tmp_path / "t.model", vocab_size=300, symbols=["<|im_start|>", "<|im_end|>"])
    model = load(path)
    assert {"<s>", "</s>", "<|im_start|>", "<|im_end|>"} <= set(model.special)
    assert model.encode_marked("a</s>b") == [*model.encode("a"), model.eos_id, *model.encode("b")]
    for choice, end in (("plain", model.eos_id), ("chatml", model.special["<|im_end|>"])):
        rendered = Renderer(find_template(choice, model), model)(talk("the king", " said good"))
        counted = rendered.tokens[rendered.answer]
        assert counted[-1] == end and model.decode(counted[:-1].tolist()) == " said good"
        assert np.flatnonzero(np.diff(rendered.answer.astype(int), prepend=0, append=0)).size == 2
