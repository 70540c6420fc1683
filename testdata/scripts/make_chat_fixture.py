#!/usr/bin/env python3
"""Make testdata/chat: templates, made-up conversations, and what transformers and TRL make of them.

    python testdata/scripts/make_chat_fixture.py

Needs transformers, trl, tokenizers, torch (versions: testdata/README.md). The templates were written for
this fixture; together they use what real ones use.
"""
import json, os, tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "chat")
MODEL = os.path.join(HERE, "..", "lm", "llama_untied")

DEFAULT = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou answer in few words.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
STRICT = """{{ bos_token }}{% set ns = namespace(system='', turns=0) %}
{% if messages[0].role == 'system' %}
  {% set ns.system = messages[0].content.strip() ~ '\\n' %}
  {% set rest = messages[1:] %}
{% else %}
  {% set rest = messages %}
{% endif %}
{% for message in rest %}
  {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate, got ' + message.role + ' at ' ~ loop.index0) }}
  {% endif %}
  {% if message.role == 'user' %}
[{{ loop.index }}] {{ (ns.system if loop.first else '') + message.content.strip() }} [/{{ loop.index }}]
  {%- elif message.role == 'assistant' %}
    {% generation %}
 {{ message.content.strip() + eos_token }}
    {% endgeneration %}
  {% endif %}
{% endfor %}
"""
TOOLS = """{%- macro show(content) %}
    {%- if content is string %}{{ content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}{{ part.text if part.type == 'text' else '<' ~ part.type ~ '>' }}{% endfor %}
    {%- elif content is none or content is not defined %}{{ '' }}
    {%- else %}{{ content | tojson }}{%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
        {{- tool.function.parameters | tojson(indent=2, sort_keys=true) ~ '\\n' }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}{% set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'note' %}{% continue %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {%- if loop.previtem is defined and loop.previtem.role == message.role %}{{- '+' }}{% endif %}
    {{- '<|im_start|>' ~ message.role | upper ~ (' last' if loop.index0 == ns.last else '') ~ '\\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '(' ~ message.reasoning_content.strip('\\n') ~ ')' }}
    {%- endif %}
    {%- set text = show(message.content) %}
    {%- if '</think>' in text %}
        {{- text.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- text }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\ncall ' ~ call.function.name ~ ' ' }}
        {%- for key, value in call.function.arguments.items() %}
            {{- key ~ '=' }}{{ value }}{{ ';' if not loop.last }}
        {%- endfor %}
        {{- ' ' ~ (call.function.arguments | tojson(ensure_ascii=true)) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>ASSISTANT\\n' }}{{ '<think>' if enable_thinking is defined and enable_thinking }}{% endif %}"""

TOOL = [{"type": "function", "function": {"name": "sum", "description": "Adds <numbers> & 'more' \u00fc \u2603",
         "parameters": {"type": "object", "required": ["a"], "properties": {"a": {"type": "number", "default": 1.0}, "b": {"type": "number", "tiny": 1e-07, "huge": 1e16, "none": None, "ok": True, "empty": {}, "list": []}}}}}]


def user(text): return {"role": "user", "content": text}
def system(text): return {"role": "system", "content": text}
def assistant(text): return {"role": "assistant", "content": text}


CASES = [
    ("default", [user("hi there")], {}),
    ("default", [user("hi there")], {"add_generation_prompt": True}),
    ("default", [system("  be kind \n"), user("what is 2 and 3?"), assistant(" 5 "), user("and 4?")], {"add_generation_prompt": True}),
    ("default", [user("odd <|im_end|> text\twith\nlines"), assistant("")], {}),
    ("strict", [system("be kind"), user("a "), assistant(" b"), user("c")], {}),
    ("strict", [user("a"), assistant("b")], {}),
    ("strict", [user("a"), user("b")], {}),
    ("tool_use", [user("sum 1 and 2")], {"tools": TOOL, "add_generation_prompt": True}),
    ("tool_use", [user("sum 1 and 2")], {"tools": TOOL, "add_generation_prompt": True, "enable_thinking": True}),
    ("tool_use", [user([{"type": "text", "text": "look"}, {"type": "image"}]), {"role": "note", "content": "unseen"},
                  {"role": "assistant", "content": None, "thinking": "\nhmm\n", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1.5, "b": 2, "c": True, "d": None, "e": ["x", "it's", 1e-7], "f": {"k": "\u00e9"}}}}]},
                  {"role": "tool", "content": "3"}, assistant("<think>why</think>\n\nit is 3"), assistant("done"), {"role": "stop", "content": ""}, user("unseen")], {"tools": TOOL}),
]
PREFERENCES = {
    "explicit": [
        {"prompt": [user("what is 2 and 3?")], "chosen": [assistant("5")], "rejected": [assistant("6, or so")]},
        {"prompt": [system("be kind"), user("hi"), assistant("hi"), user("who is in?")], "chosen": [assistant("Ann is in.")], "rejected": [assistant("no one")]},
    ],
    "implicit": [
        {"chosen": [user("say a b"), assistant("a b")], "rejected": [user("say a b"), assistant("b a")]},
        {"chosen": [system("be kind"), user("hi"), assistant("hi there")], "rejected": [system("be kind"), user("hi"), assistant("what?"), user("no"), assistant("hi")]},
    ],
    "implicit_text": [
        {"chosen": "what is 2 and 3? It is 5", "rejected": "what is 2 and 3? It is 6, or so"},
        {"chosen": "the den is red", "rejected": "the den is red and so on"},
        {"chosen": "who is in? Ann", "rejected": "who is in? Bo"},
        {"chosen": "caf\u00e9 a", "rejected": "caf\u00e9 \u00fc"},
    ],
}
SFT = {
    "text": [{"text": "the den is red"}, {"text": "who is in?</s>"}],
    "prompt_completion": [{"prompt": "what is 2 and 3?", "completion": " 5"}, {"prompt": "say th", "completion": "e den</s>"}],
    "messages": [{"messages": [user("hi"), assistant("hi there")]}],
    "prompt_completion_chat": [{"prompt": [user("hi")], "completion": [assistant("hi there")]}],
}


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.dumps([CASES, PREFERENCES, SFT]), "the den the den what is who is in system user assistant"]
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if ord(c) < 127] + ["\u0120", "\u010a", "\u0109"]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=128, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False))
    assert tokenizer.get_vocab_size() == 128
    return tokenizer


TEXTS = ["the den is red", " the  den", "line one \n2 and  3\n\n 45", "it's Ann, who'd say", "a</s> b <s>c", "caf\u00e9 \u2603 tail ", "", "x\ty", "e\u0301"]


def class_cases(byte_level):
    """Tokenizers that transformers rebuilds from their class, with a file that says otherwise."""
    metaspace = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    metaspace.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    metaspace.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = [t for t in TEXTS if t.isascii()] + ["the den", "who is in"]
    metaspace.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    metaspace.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bytes_ = Tokenizer.from_str(byte_level.to_str())
    bytes_.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    cases = []
    for tokenizer, config in [
        (bytes_, {"tokenizer_class": "GPT2Tokenizer", **special}),
        (bytes_, {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, **special}),
        (bytes_, {"tokenizer_class": "Qwen2Tokenizer", **special, "pad_token": "<pad>"}),
        (bytes_, {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True, **special, "pad_token": "<pad>"}),
        (bytes_, {"tokenizer_class": "LlamaTokenizer", **special}),
        (bytes_, {"tokenizer_class": "PreTrainedTokenizerFast", **special}),
        (metaspace, {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, **special}),
        (metaspace, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, **special}),
        (metaspace, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, **special}),
        (metaspace, {"tokenizer_class": "PreTrainedTokenizerFast", **special}),
    ]:
        with tempfile.TemporaryDirectory() as tmp:
            tokenizer.save(os.path.join(tmp, "tokenizer.json"))
            with open(os.path.join(tmp, "tokenizer_config.json"), "w") as f:
                json.dump(config, f)
            loaded = AutoTokenizer.from_pretrained(tmp)
        ids = [loaded(t)["input_ids"] for t in TEXTS]
        assert len(loaded) == tokenizer.get_vocab_size(), config
        cases.append({"tokenizer": "metaspace" if tokenizer is metaspace else "byte_level", "config": config, "ids": ids,
                      "decoded": [loaded.decode(i) for i in ids], "decoded_plain": [loaded.decode(i, skip_special_tokens=True) for i in ids]})
    return {"texts": TEXTS, "tokenizers": {"metaspace": json.loads(metaspace.to_str()), "byte_level": json.loads(bytes_.to_str())}, "cases": cases}


def main():
    torch.set_num_threads(1)
    os.makedirs(OUT, exist_ok=True)
    make_tokenizer().save(os.path.join(OUT, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}, "unk_token": "<unk>",
              "chat_template": [{"name": "default", "template": DEFAULT}, {"name": "strict", "template": STRICT}, {"name": "tool_use", "template": TOOLS}]}
    with open(os.path.join(OUT, "tokenizer_config.json"), "w") as f:
        json.dump(config, f, indent=1)
    tokenizer = AutoTokenizer.from_pretrained(OUT)
    templates = {"default": DEFAULT, "strict": STRICT, "tool_use": TOOLS}
    cases = []
    for name, messages, options in CASES:
        case = {"template": name, "messages": messages, "options": options}
        try:
            case["text"] = tokenizer.apply_chat_template(messages, chat_template=templates[name], tokenize=False, **options)
            case["ids"] = tokenizer.apply_chat_template(messages, chat_template=templates[name], return_dict=True, **options)["input_ids"]
        except Exception as error:
            case["error"] = str(error)
        cases.append(case)
        print(name, repr(case.get("text", case.get("error")))[:150])
    golden = {"versions": {"transformers": transformers.__version__, "trl": trl.__version__}, "cases": cases, "preferences": {}, "sft": {}}
    golden["classes"] = class_cases(Tokenizer.from_file(os.path.join(OUT, "tokenizer.json")))
    tokenizer.chat_template = DEFAULT
    for kind, rows in PREFERENCES.items():
        with tempfile.TemporaryDirectory() as tmp:
            model = AutoModelForCausalLM.from_pretrained(MODEL)
            trainer = DPOTrainer(model=model, args=DPOConfig(output_dir=tmp, use_cpu=True, bf16=False, report_to="none"), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
            ids = [{k: list(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trainer.train_dataset]
        golden["preferences"][kind] = [{"row": row, "tokens": t} for row, t in zip(rows, ids)]
    for kind, rows in SFT.items():
        with tempfile.TemporaryDirectory() as tmp:
            model = AutoModelForCausalLM.from_pretrained(MODEL)
            trainer = SFTTrainer(model=model, args=SFTConfig(output_dir=tmp, use_cpu=True, bf16=False, report_to="none"), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
            ids = [{k: list(row[k]) for k in ("input_ids", "labels")} for row in trainer.train_dataset]
        golden["sft"][kind] = [{"row": row, "tokens": t} for row, t in zip(rows, ids)]
    with open(os.path.join(OUT, "golden.json"), "w") as f:
        json.dump(golden, f)


main()
