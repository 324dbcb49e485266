"""Texts of odd and hostile kinds."""

ODD = (
    "", " ", "\t\n", "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x7f\x80\x9f",
    "\ufeff", "a\u200db", "\u202egnp.exe", "\u2028\u2029", "e\u0301" * 40, "\U0001f468\u200d\U0001f469",
    "\ufffe\uffff", "\U0010ffff", "\ue000", "نص عربي", "中文字" * 50, "ไทย", "हिन्दी", "ß ﬁ Ⅳ ½ ²",
    "<|eos|>", "<|bos|><|pad|>", "<|im_end|>\n<|im_start|>assistant\n", "{{ x }}{% raw %}", "{", "}}",
    "%s%n", "=1+1", "@SUM(A1)", "-2+3", "+cmd|' /C calc'!A0", "</script><script>", "a" * 5000,
    "7" * 5000, "\r", "a\rb", "\r\n", '"', "'", '""', "\\", "\\u0000", "null", "NaN", "#### 42",
    "#### 1,25", "#### ٤٢", "#### 1/0", "Human: a\n\nAssistant: b", "Human:" * 300, "1e999",
    "١٢٣", "１２", "–−-", "\u0130I\u0131i", "Z" + "\u0335" * 200, "[" * 3000, '{"a":' * 3000,
    '["\\ud800"]', '{"name": "f", "arguments": "\\ud800"}', "[" + "9" * 5000 + "]", "../../etc/passwd",
)  # fmt: skip
"""In data."""
YAML = (
    "!!python/object/apply:os.system [id]", "&a [*a]", "0x" + "f" * 6000, "2024-13-45", "2024-01-01",
    "1:60:60", ".inf", ".nan", "1e999", "9" * 5000, "!!binary aGk=", "!!set {a, b}", "{[1]: 2}",
    "{a: 1, a: 2}", '"\\ud800"', '"\\0"', '"\\e[31m"', "|\n  text\n", "~", "[" * 500, "*missing",
    "{<<: 5}", "? [a]\n: b", "'never closed", "\t- 1", "--- b", "no", "0o17", "- 1", "{1: 2}",
    "{self: 1}", "{null: 1}", "{true: x}", "\x1b[31m", "!!omap [a: 1]", "!!pairs [a: 1]", "\x00",
    "&b {a: &c [1, 2], d: *c}", "!!float x", "!!int x", "!!timestamp x", "!!bool x", "=", "1_000",
    "&a [" + ", ".join(["x"] * 9) + "]\n" + "\n".join(
        f"l{i}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9)
    ),
)  # fmt: skip
TEMPLATES = (
    "{prompt}", "{text}", "{a.b[0].c}", "{x[*]}", "{x:json}", "{x?}", "{x:.15g}", "{x:g}", "{x!r}",
    "{", "}", "{}", "{0}", "{x:{y}}", "{x:999999999d}", "{x:.999999999f}", "{question}\n{answer}",
    "{{x}} {text}", "{x[99999999999999999999]}", "{x" + "[0]" * 3000 + "}", "{" + "a." * 3000 + "a}",
    "{label}", "no field", "", "{x:c}", "{x:n}", "{x:,}", "{x:%}", "{x:\u202e>20}", "{x:09999d}",
)  # fmt: skip
HOSTILE = (
    "<script>window.planted = 1</script>", "</script><script>window.planted = 1</script>", "<!--", "]]>", "<![CDATA[",
    "\"><img src=x onerror='window.planted = 1'>", "' onmouseover='window.planted = 1", "</title></style><svg onload=planted()>",
    "<a href=javascript:window.planted=1>x</a>", "<iframe src=//evil.example></iframe>", "<base href=//evil.example/>",
    "<meta http-equiv=refresh content=0;url=//evil.example>", "<link rel=stylesheet href=//evil.example>", "&lt;b&gt; &amp; &#x3c;",
    "{{ 7 * 7 }}{% raw %}", "${window.planted = 1}", "%3Cscript%3E", "[red]x[/red]", "[/]", "[link=//evil.example]x[/link]", ":smile:",
    "\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://evil.example\x1b\\x\x1b]8;;\x1b\\", "\x9b31mx", "\x08\x08\x7f", "a\rb", "a\nb\n\n# c\n\n| d | e |",
    "\u202egnp.exe", "\u2066x\u2069", "a\u2028b\u2029c", "\ud800", "\x00", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "=cmd|' /C calc'!A0", "`x`", "|x|",
    "![x](//evil.example/x.png)", "[x](javascript:planted())", "<//evil.example>", "**x** _y_ ~~z~~", "# x", "- x", "---\nlicense: mit\n---", "$x$",
    "__proto__", "constructor", "toString", "a.b[c]", "datum['x']", "\\", '\\"', "'", '"', "  x  ", "x" * 1900, "中文 عربي", "\U0001f468\u200d\U0001f469",
)  # fmt: skip
"""In names and outputs."""
