"""Chat templates: what transformers renders, and what a hostile one may not do."""

import json

import pytest

from llmtrain.data.chat.template import CHATML, ChatTemplate, find_template, folder_template
from llmtrain.data.errors import DataError

TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": " a\n"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, name="mine")


def test_a_folder_s_template_and_special_tokens(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    with pytest.raises(DataError, match="no chat template"):
        folder_template(tmp_path)
    loop = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + loop + "{% if add_generation_prompt %}[me]{% endif %}")
    assert folder_template(tmp_path).render(TALK[:2], answer_follows=True) == "<s>[system] s</s>\n[user] u</s>\n[me]"
    assert folder_template(tmp_path).render(TALK[:2]) == "<s>[system] s</s>\n[user] u</s>\n"
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": several}))
    assert folder_template(tmp_path).render(TALK) == "d</s>"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ self.__init__.__globals__['os'].system('true') }}", "unsafe|undefined"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ 'a' * 1000000000000 }}", "not allowed"),
        ("{{ 9 ** 999999999 }}", "not allowed"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "[Rr]ange"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_hostile_template_is_refused(source, said):
    with pytest.raises(DataError, match=said):
        template(source).render(TALK)


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ 1 +", "{% generation %}x"])
def test_what_is_no_template_is_said(source):
    with pytest.raises(DataError, match="mine: not a jinja template"):
        template(source)


def test_the_day_does_not_change_training_data(folder, tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%d %b %Y') }}")
    from llmtrain.data.tokenizer import load

    assert find_template(str(file), load(folder)).render(TALK) == "26 Jul 2024"


def test_choices(folder, tokenizer, tmp_path):
    assert find_template("plain", tokenizer).render(TALK) == "su a\n<|im_end|>"
    assert find_template("chatml", tokenizer).source == CHATML
    with pytest.raises(DataError, match=r"no special token <\|start_header_id\|>"):
        find_template("llama3", tokenizer)
    with pytest.raises(DataError, match=r"no chat template .*takes chatml, llama3, plain"):
        find_template("auto", tokenizer)
    with pytest.raises(DataError, match="'chatlm': neither auto"):
        find_template("chatlm", tokenizer)


SOURCES = [
    CHATML,
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | tojson }}{% else %}{{ m['content'].strip() }}{% endif %}\n{% endfor %}",
    "{%- for m in messages if m.role != 'system' -%}\n  {{- m.content | trim }}\n {%- if loop.last %}{% break %}{% endif %}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_what_transformers_renders(source, folder):
    pytest.importorskip("transformers", reason="its rendering is the standard")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate(source, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}, name="x")
    for talk, follows in ((TALK, False), (TALK[:2], True)):
        wanted = theirs.apply_chat_template(talk, chat_template=source, tokenize=False, add_generation_prompt=follows)
        assert ours.render(talk, answer_follows=follows) == wanted
