"""Help for every step: what it is for, what the words mean, which keys work; in a little Markdown."""

from __future__ import annotations

import re

from textual.content import Content

KEYS = """
**Keys** · Tab, Shift+Tab, ↑ ↓ move · Ctrl+N next step · Esc back · Ctrl+O open a run ·
Ctrl+P all commands · Ctrl+T light or dark · Ctrl+Q leave
"""

HELP = {
    "device": """
# Device

Where will the model run? A **profile** describes a device and how much the model may take there.
Profiles that fit
this machine come first: speed is measured here, so the profile has to be of this machine.

- **Memory**: weights, cache and working memory together, GiB.
- **First token in**: the wait between question and answer (TTFT), ms.
- **Each token in**: the time per word or so after that (TPOT), ms. 50 ms is faster than most people
  read.
- **Prompt, Answer**: tokens of one request; a token is about three quarters of a word.
- **At once**: requests that run at the same time.
"""
    + KEYS,
    "model": """
# Model and data

Which model is to shrink? It must be LLaMA-like: Llama, Mistral, Qwen 2 or Qwen 3.

- **Starter**: a small model that comes with the program. Nothing to download; good for a first run.
- **Folder**: a Hugging Face model on this disk. **GGUF**: one file, as llama.cpp uses. **Hub**:
  `owner/name`.

**Accuracy** is what the search keeps high. *Agreement* asks how often the small model picks the
same next word as
the whole one: needs no data, takes seconds a candidate. *Tasks* are public tests (lm-eval): slower,
and they need
their data, from the hub or a folder.

**Training data** tunes the model to being cut. *Data-free* lets the whole model write its own text.
"""
    + KEYS,
    "plan": """
# Plan

What is about to happen and what it takes. Nothing has been started.

- **quick** shows the whole way in minutes. **standard** is a good result overnight or faster.
  **paper** spends what
  the method's authors spent, days on a large model.
- **Evaluations**: smaller models that are built, scored and measured for real.
- **Tuning**: longest time spent on teaching the model to work when parts are missing.

The line at the bottom does the same from a shell. Ctrl+Y copies it.
"""
    + KEYS,
    "run": """
# Run

The run works in a process of its own: it goes on if you close this window or lose the connection.

Every dot is a smaller model that was built, scored and measured: the further left the smaller, the
higher the more
accurate. ● are the best trade-offs so far (the **Pareto front**), · the others, ◆ is the whole
model, the vertical
line your memory budget.

**Keys here** · V other chart · P pause or go on · S stop and keep what is finished · R go on after
a stop
"""
    + KEYS,
    "choose": """
# Choose

The best trade-offs that were found. ★ is the one the run chose: the most accurate within all your
budgets.

- **95%**: the interval that the true accuracy lies in, most likely.
- **Budgets**: ✓ met, ✗ missed, in the order memory, first token, each token.
- **What if** changes the budgets and picks again from what was measured; nothing is evaluated anew.
- **Layers** draws the model: a column a layer, as high as its MLP is wide; a gap is a layer that
  was dropped.

**Keys here** · O sort by the next column · Enter takes the line · 1 to 4 show Chart, Layers,
Compare, What if
"""
    + KEYS,
    "package": """
# Package

The **package** is the folder that serves here: the model, its tokenizer and `manifest.json`, which
says what it is, how good and fast it was measured, and a hash of every file. It is checked when it
is written.

The other formats are for other programs: **GGUF** for llama.cpp, a **Hugging Face** folder for
transformers, **vLLM** for vLLM. The line at the bottom does the same from a shell. Ctrl+Y copies it.
"""
    + KEYS,
    "serve": """
# Serve and try

Starts the endpoint on this machine and lets you talk to the model. Any program that speaks the
OpenAI protocol can
use it: the URL, the key and a line for curl are shown. Ctrl+Y copies that line. Ctrl+S starts and
ends the endpoint.

The endpoint ends with this window; `compress serve FOLDER` starts it alone.
"""
    + KEYS,
}


def styled(text: str) -> Content:
    """Headings, bold, slanted, code and lists of a help text, for a widget that wraps it."""
    joined = re.sub(r"(?<!\n)\n(?![\n-])", " ", text.strip())
    marked = joined.replace("[", r"\[")
    for pattern, replacement in (
        (r"^# (.+?)$", r"[bold $text-accent]\1[/]"),
        (r"^- ", "• "),
        (r"\*\*(.+?)\*\*", r"[bold]\1[/]"),
        (r"\*(.+?)\*", r"[italic]\1[/]"),
        (r"`(.+?)`", r"[$text-accent]\1[/]"),
    ):
        marked = re.sub(pattern, replacement, marked, flags=re.MULTILINE)
    return Content.from_markup(marked)
