# SPDX-License-Identifier: Apache-2.0
"""Run by a Python that has vLLM: read one JSON object of questions from stdin, print one of answers as the last line.

    {"model": folder, "engine": {…of vllm.LLM}, "ids": [[…], …], "tokens": n, "adapter": folder or null}

The answers are each prompt's first `tokens` greedy tokens, and the log-probabilities of all words for the first one.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    asked = json.loads(sys.stdin.read())
    if asked["engine"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = {"dtype": "float16", "enforce_eager": True, "max_model_len": 128, "seed": 0, "max_logprobs": -1}
    engine = LLM(model=asked["model"], skip_tokenizer_init=True, **{**settings, **asked["engine"]})
    words = engine.llm_engine.model_config.get_vocab_size()
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked.get("adapter") else None
    wanted = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], logprobs=words, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": row} for row in asked["ids"]]
    answers = engine.generate(prompts, wanted, lora_request=adapter, use_tqdm=False)
    first = [answer.outputs[0].logprobs[0] for answer in answers]
    print(
        json.dumps(
            {
                "method": str(engine.llm_engine.model_config.quantization),
                "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
                "log_probabilities": [[row[word].logprob for word in range(words)] for row in first],
            }
        )
    )


if __name__ == "__main__":
    main()
