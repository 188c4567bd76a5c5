"""The house keeps its rules: import directions, quiet imports, no patching of other libraries, budgets.

Each offence is printed as file:line. Each rule is also shown to fire on a small bad example and to be silent on a good
one: a rule that never fires protects nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house_rules
from tests.house_rules import RULES, SourceFile

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("onecard", "tools", "benchmarks")


def sources() -> list[SourceFile]:
    paths = sorted(REPOSITORY.glob("*.py"))
    for folder in FOLDERS:
        paths += sorted((REPOSITORY / folder).rglob("*.py"))
    return [
        house_rules.parse(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")) for path in paths
    ]


SOURCES = sources()


def test_the_walk_sees_the_whole_house() -> None:
    seen = {str(file.path) for file in SOURCES}
    expected = {
        "finetune.py",
        "finetune_chat.py",
        "generate.py",
        "onecard/config/parsing.py",
        "onecard/data/chat_template.py",
    }
    expected |= {"onecard/model/lora/adapter.py", "onecard/train/loop.py", "onecard/inference/generate.py"}
    assert expected <= seen
    assert len(seen) >= 35


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule) -> None:
    offences = [f"{file.path}:{line}: {what}" for file in SOURCES for line, what in rule(file)]
    assert not offences, f"{rule.__doc__.splitlines()[0]}\n" + "\n".join(offences)


# (rule, path, source, lines on which the rule must fire)
BAD = [
    ("layers", "onecard/data/encode.py", "from onecard.model import load\n", [1]),
    ("layers", "onecard/data/encode.py", "from onecard import train\n", [1]),
    ("layers", "onecard/data/encode.py", "from ..model.load import load_base\n", [1]),
    ("layers", "onecard/train/loop.py", "def f():\n    from onecard.inference.generate import stream\n", [2]),
    ("layers", "onecard/export/merge/merge.py", "import onecard.train.loop\n", [1]),
    (
        "layers",
        "onecard/config/training.py",
        "import importlib\nx = importlib.import_module('onecard.data.encode')\n",
        [2],
    ),
    ("layers", "onecard/model/load.py", "from onecard.recipes import finetune\n", [1]),
    ("layers", "onecard/model/load.py", "from tools.score import main\n", [1]),
    ("known_layers", "onecard/helpers.py", "x = 1\n", [1]),
    ("known_layers", "onecard/utils/misc.py", "x = 1\n", [1]),
    ("sole_importers", "onecard/train/loop.py", "import peft\n", [1]),
    ("sole_importers", "onecard/model/load.py", "from peft.utils import x\nimport bitsandbytes as bnb\n", [1, 2]),
    ("sole_importers", "tools/chat.py", "def f():\n    import gradio\n", [2]),
    ("sole_importers", "onecard/train/optim.py", "__import__('bitsandbytes')\n", [1]),
    ("text_is_plain", "onecard/data/encode.py", "import transformers\n", [1]),
    ("text_is_plain", "onecard/data/encode.py", "import torch\n", [1]),
    ("text_is_plain", "onecard/data/batches.py", "import torch\nfrom gradio import x\n", [2]),
    ("options_are_light", "onecard/config/training.py", "def f():\n    import numpy\n", [2]),
    ("entries_are_light", "finetune.py", "import torch\n", [1]),
    (
        "entries_are_light",
        "tools/score.py",
        "try:\n    from transformers import x\nexcept ImportError:\n    pass\n",
        [2],
    ),
    (
        "entries_are_light",
        "tools/score.py",
        "if TYPE_CHECKING:\n    from onecard.inference.batch.evaluate import Case\n",
        [1],
    ),
    ("quiet_import", "onecard/model/x.py", "import torch\nN = torch.cuda.device_count()\n", [2]),
    ("quiet_import", "onecard/model/x.py", "import os\nos.environ['A'] = '1'\n", [2]),
    ("quiet_import", "onecard/model/x.py", "import os\nHOME = os.environ.get('HOME')\n", [2]),
    ("quiet_import", "onecard/model/x.py", "for i in (1, 2):\n    x = i\n", [1]),
    ("quiet_import", "onecard/model/x.py", "def f(x=load()):\n    pass\n", [1]),
    ("quiet_import", "onecard/model/x.py", "class A:\n    x = connect()\n", [2]),
    ("quiet_import", "onecard/model/x.py", "@register('a')\ndef f():\n    pass\n", [1]),
    ("quiet_import", "onecard/model/x.py", "try:\n    import x\nexcept ImportError:\n    warn()\n", [4]),
    ("quiet_import", "onecard/model/x.py", "x: int = parse()\n", [1]),
    ("quiet_import", "onecard/model/x.py", "import sys\nsys.path.append('x')\n", [2]),
    ("quiet_import", "onecard/model/x.py", "def f():\n    return open('x')\ndef g():\n    return f()\nX = g()\n", [5]),
    ("quiet_import", "onecard/x.py", "X = Path('x').read_text(encoding='utf-8')\n", [1]),
    ("hands_off", "onecard/train/x.py", "import torch\ntorch.foo = 1\n", [2]),
    ("hands_off", "onecard/train/x.py", "from torch import nn\ndef f():\n    nn.Linear.forward = None\n", [3]),
    ("hands_off", "tools/x.py", "import sys\ndef f():\n    sys.stdout = None\n", [3]),
    ("hands_off", "onecard/train/x.py", "def f(model):\n    model.forward = None\n", [2]),
    ("hands_off", "onecard/train/x.py", "def f(model: 'Model'):\n    model.config.use_cache = True\n", [2]),
    ("hands_off", "onecard/train/x.py", "def f(model):\n    setattr(model, 'forward', None)\n", [2]),
    ("hands_off", "onecard/train/x.py", "def f():\n    m = load_it()\n    m.x, m.y = 1, 2\n", [3, 3]),
    ("hands_off", "onecard/train/x.py", "import torch\ndef f():\n    m = torch.nn.Linear(1, 1)\n    m.x += 1\n", [4]),
    ("hands_off", "onecard/train/x.py", "def make() -> Model: ...\ndef f():\n    m = make()\n    del m.x\n", [4]),
    ("budgets", "onecard/x.py", "x = 1\n" * 401, [401]),
    ("budgets", "finetune.py", "x = 1\n" * 41, [41]),
    ("budgets", "onecard/x.py", "def f():\n" + "    x = 1\n" * 60, [1]),
    ("budgets", "onecard/x.py", "def f(a, b, c, d, e, *, f, g, h, i): ...\n", [1]),
    ("budgets", "onecard/x.py", "class A:\n    async def f(self, a, b, c, d, e, f, g, *h, **i): ...\n", [2]),
    (
        "budgets",
        "onecard/x.py",
        "def f():\n  for a in b:\n    with c:\n      try:\n        x\n      except E:\n        if d:\n          y\n",
        [7],
    ),
    ("manners", "onecard/x.py", "print('a')\n", [1]),
    ("manners", "onecard/x.py", "import sys\nsys.exit(1)\n", [2]),
    ("manners", "onecard/x.py", "import os\nos._exit(1)\n", [2]),
    ("manners", "tools/x.py", "os.system('ls')\nsubprocess.run('ls', shell=True)\n", [1, 2]),
    ("manners", "tools/x.py", "path.read_text()\nopen('a')\npath.open('w')\n", [1, 2, 3]),
    ("manners", "onecard/x.py", "torch.load(x)\ntorch.load(x, weights_only=False)\n", [1, 2]),
    ("manners", "onecard/x.py", "pickle.load(x)\nlogging.basicConfig()\n", [1, 2]),
    ("manners", "onecard/x.py", "f(x, trust_remote_code=True)\n", [1]),
    ("future_annotations", "onecard/x.py", "'''Doc.'''\n", [1]),
    ("documented", "onecard/x.py", "x = 1\n", [1]),
    ("documented", "onecard/x.py", "'''Doc.'''\nclass A:\n    pass\ndef f(): ...\ndef _g(): ...\n", [2, 4]),
]

# (rule, path, source): near misses on which a rule must stay silent
GOOD = [
    ("layers", "onecard/train/loop.py", "from onecard.train import checkpoint\nfrom onecard.model.load import x\n"),
    ("layers", "onecard/recipes.py", "from onecard.train.loop import x\nfrom onecard.inference.generate import y\n"),
    ("sole_importers", "onecard/model/lora/adapter.py", "import peft\n"),
    ("text_is_plain", "onecard/data/batches.py", "import torch\nimport numpy\n"),
    ("text_is_plain", "onecard/model/load.py", "import transformers\n"),
    (
        "options_are_light",
        "onecard/config/parsing.py",
        "import yaml\nimport re\nfrom onecard.config.training import x\n",
    ),
    ("entries_are_light", "finetune.py", "import sys\ndef main():\n    import torch\n"),
    (
        "quiet_import",
        "onecard/x.py",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass A:\n    x: int = 1\n",
    ),
    ("quiet_import", "onecard/x.py", "A = re.compile('a')\nB = Path(__file__).resolve().parents[1]\nC = A_B.split()\n"),
    ("quiet_import", "onecard/x.py", "f = lambda: load()\ndef g():\n    load()\nif __name__ == '__main__':\n    g()\n"),
    ("quiet_import", "onecard/x.py", "class A:\n    pass\nB = A()\n"),
    ("quiet_import", "onecard/x.py", "def f(a):\n    b = []\n    b.append(tuple(a))\n    return b\nX = f('a')\n"),
    ("quiet_import", "tools/x.py", "import sys\nsys.path.insert(0, 'x')\nX = Path('x').read_text(encoding='utf-8')\n"),
    ("hands_off", "onecard/x.py", "class A:\n    def f(self):\n        self.x = 1\n        self.x.y = 2\n"),
    (
        "hands_off",
        "onecard/x.py",
        "from onecard.config.training import C\ndef f(c: C | None):\n    c.x = 1\n    d = C()\n    d.y += 1\n",
    ),
    ("hands_off", "tools/x.py", "def f(proto):\n    proto.field = 1\n"),
    (
        "budgets",
        "onecard/x.py",
        "def f(a):\n  if a:\n    x\n  elif b:\n    x\n  elif c:\n    x\n  else:\n    for d in e:\n      if g: y\n",
    ),
    ("budgets", "onecard/x.py", "def f():\n" + "    x = 1\n" * 59),
    ("manners", "onecard/console.py", "print('a')\n"),
    ("manners", "onecard/train/signals.py", "import os\nos._exit(1)\n"),
    ("manners", "onecard/x.py", "path.open('rb')\nopen(x, 'wb')\nopen(x, encoding='utf-8')\nos.open(x, 0)\n"),
    ("manners", "onecard/x.py", "torch.load(x, weights_only=True)\nf(trust_remote_code=flag)\n"),
    ("future_annotations", "onecard/x.py", "from __future__ import annotations\n"),
    ("documented", "onecard/data/__init__.py", ""),
]


@pytest.mark.parametrize(("rule", "path", "source", "lines"), BAD)
def test_rule_fires(rule: str, path: str, source: str, lines: list[int]) -> None:
    found = getattr(house_rules, rule)(house_rules.parse(path, source))
    assert [line for line, _ in found] == lines


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_rule_stays_silent(rule: str, path: str, source: str) -> None:
    assert list(getattr(house_rules, rule)(house_rules.parse(path, source))) == []


def test_every_rule_has_bad_examples() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for rule, *_ in BAD}
