"""Vision-LLMs built from transformers, peft and vlkernels, run from a checkout with `python -m models`.

Where to look: `recipes/` says which system is trained and how, `build.py` assembles the model, `backbones/` its
parts, `data/` the examples, `training/` the staged loop, `evaluation/` the answers, `reports/` what is printed.
The folder is never packaged and nothing imports it.
"""
