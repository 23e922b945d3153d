"""Digests of what the stages of the tokenizer make with the threads of this process, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_align_items_stage import digests_of_all

threads = torch.get_num_threads()
print(json.dumps(digests_of_all(Path(sys.argv[1])) | {"threads": threads}))
