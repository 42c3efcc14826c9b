"""Reports as people read them: on a terminal and in a pipe."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from reattend import demo
from reattend.cli import console
from reattend.reporting.readable import aligned, table

NAME = (
    "model.layers.0.self_attn.q_proj.weight BF16 [192, 192] -> model.layers.0.self_attn.q_proj.weight I8 [192, 192]"
)
REPORT = {
    "model": "[bold]org/demo[/bold]",
    "parameters": 2_361_408,
    "bytes": 4_722_816,
    "peak_memory_bytes": 999_960,
    "cache_bytes_per_token": 512,
    "bits_per_byte": 2.94634,
    "perplexity": 1_234_567.89,
    "perplexity_stderr": None,
    "tied": True,
    "features": [],
    "shards": {"model-00001-of-00002.safetensors": 1_500_000_000, "model-00002-of-00002.safetensors": 7},
    "steps": [{"step": "int8", "select": ["*.mlp.*", "*.self_attn.*"], "keep": []}],
    "changes": [NAME, "and 27 more"],
    "error_per_layer": [0.01234567, 2, 0.5],
}
PLAIN = f"""\
model                  [bold]org/demo[/bold]
parameters             2 361 408
bytes                  4 722 816 (4.7 MB)
peak_memory_bytes      999 960 (1.0 MB)
cache_bytes_per_token  512
bits_per_byte          2.9463
perplexity             1 234 567.9
perplexity_stderr      not measured
tied                   yes
features               none
shards                 model-00001-of-00002.safetensors: 1 500 000 000 (1.5 GB)
                       model-00002-of-00002.safetensors: 7
steps                  - step: int8
                         select:
                           *.mlp.*
                           *.self_attn.*
                         keep: none
changes                {NAME}
                       and 27 more
error_per_layer        0.012346, 2, 0.5"""
READABLE = """\
model                  [bold]org/demo[/bold]
parameters             2 361 408
bytes                  4 722 816 (4.7 MB)
peak_memory_bytes      999 960 (1.0 MB)
cache_bytes_per_token  512
bits_per_byte          2.9463
perplexity             1 234 567.9
perplexity_stderr      not measured
tied                   yes
features               none
shards                 model-00001-of-00002.safetensors  1 500 000 000 (1.5 GB)
                       model-00002-of-00002.safetensors  7
steps                  step    int8
                       select  - *.mlp.*
                               - *.self_attn.*
                       keep    none
changes                - model.layers.0.self_attn.q_proj.weight BF16 [192, 192]
                         -> model.layers.0.self_attn.q_proj.weight I8 [192, 192]
                       - and 27 more
error_per_layer        0.012346, 2, 0.5"""


def rendered(report, width, **options):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, **options).print(table(report))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_plain_lines():
    assert aligned(REPORT) == PLAIN.splitlines()
    assert aligned({}) == []


def test_a_table_at_80_columns():
    assert rendered(REPORT, 80, force_terminal=True) == READABLE.splitlines()


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_a_table_cuts_nothing_off(width):
    lines = rendered({"text_sha256": "0123456789abcdef" * 4, "changes": [NAME]}, width, force_terminal=True)
    assert max(map(len, lines)) <= width
    letters = sorted("".join(lines).replace(" ", ""))
    assert letters == sorted("text_sha256" + "0123456789abcdef" * 4 + "changes" + NAME.replace(" ", ""))


def test_show_writes_a_table_on_a_terminal_only(capsys, monkeypatch):
    console.show(REPORT, as_json=False)
    assert capsys.readouterr().out == PLAIN + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # a terminal without styles
    monkeypatch.setenv("COLUMNS", "80")
    console.show(REPORT, as_json=False)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == READABLE.splitlines()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_the_console_script_on_a_terminal():
    import pty

    ours, theirs = pty.openpty()
    command = [Path(sys.executable).with_name("reattend"), "inspect", demo.MODEL]
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env, check=False)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert not done.stderr
    assert "\x1b[1mparameters" in text
    assert "2 361 408" in text
    assert "4 727 864 (4.7 MB)" in text
