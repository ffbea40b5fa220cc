"""Chat templates: what they may do, and what a hostile one gets."""

import pytest

from tokeff.models import chat
from tokeff.models.chat import render

pytestmark = pytest.mark.core


def one(template: str, **variables) -> str:
    return render(template, [variables])[0]


def test_smollm2_conversation(smollm2):
    text = smollm2.tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    many = smollm2.tokenizer.chats([[{"role": "user", "content": c}] for c in "ab"], reply=False)
    assert [m[-12:] for m in many] == ["a<|im_end|>\n", "b<|im_end|>\n"]


def test_what_templates_rely_on():
    """Trimmed blocks, loop controls, tojson without HTML escapes, the date, namespaces, the generation tag."""
    assert one("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    assert one("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert one("{{ d | tojson }}", d={"a": "<é>"}) == '{"a": "<é>"}'
    assert len(one("{{ strftime_now('%Y') }}")) == 4
    assert one("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}") == "2"
    assert one("{% generation %}hi{% endgeneration %}") == "hi"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than"),
        ("{{ 'x' * 10**11 }}", "memory"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recurses"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ missing.attribute }}", "UndefinedError"),
    ],
)
def test_hostile_or_broken_templates(template, word, one_line):
    with one_line("chat template failed", word):
        one(template, messages=[])


def test_endless_work_is_stopped(monkeypatch, one_line):
    monkeypatch.setattr(chat, "SECONDS", 1)
    loops = "".join(f"{{% for {c} in range(99999) %}}" for c in "abc") + "{% endfor %}" * 3
    with one_line("1 seconds"):
        one(loops)


def test_messages_must_be_plain(one_line):
    with one_line("plain strings"):
        one("x", messages=[object()])
