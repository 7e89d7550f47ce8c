"""Which option real vLLM on a CPU is given, and where vLLM itself tells that it came through.

A row: option, word, what is told. Options in capitals are the operator's variables; with dashes they are words of the
assignment's engine_args; in small letters fields of its `serving`. What is told, by its first part:
  vllm, vllm_env  its own configuration, and its variables as it reads them (`/server_info`)
  args            arguments of its API server that are not the defaults (its log)
  env             the environment of its API server's process
  worker          `cpus`: which each worker may use
  agent           `ceiling`, `launcher`
`{runtime}`, `{toy}`, `{launcher}`, `{version}` in words and answers: the agent's runtime directory, the toy model,
vLLM's launcher and version.
"""

from typing import Any

Row = tuple[str, str, dict[str, Any]]

ONLINE = "int8_per_channel_weight_only"  # of vLLM's methods for a checkpoint that is not quantized, the one a CPU has
WITHOUT_EAGER: list[Row] = [
    ("VLLM_PATH", "{launcher}", {"agent.launcher": "{launcher}"}),
    ("VLLM_ENV", "VLLM_SERVER_DEV_MODE=1 A='b c'", {"vllm_env.VLLM_SERVER_DEV_MODE": True, "env.A": "b c"}),
]
ALWAYS: list[Row] = [*WITHOUT_EAGER, ("--enforce-eager", "", {"vllm.model_config.enforce_eager": True})]
FLOAT: Row = ("--dtype", "float32", {"vllm.model_config.dtype": "torch.float32"})
PLAIN: list[Row] = [*ALWAYS, FLOAT]
# One start of vLLM each, so everything that goes together is together.
STARTS: dict[str, list[Row]] = {
    "one rank": [
        *ALWAYS,
        ("MAX_MODEL_LEN", "4096", {"vllm.model_config.max_model_len": 4096}),
        ("MAX_NUM_SEQS", "7", {"vllm.scheduler_config.max_num_seqs": 7}),
        ("MAX_CONCURRENT", "5", {"agent.ceiling": 5}),
        ("DISTRIBUTED_BACKEND", "mp", {"args.distributed_executor_backend": "mp"}),
        ("RAY_ADDRESS", "127.0.0.1:1", {"env.RAY_ADDRESS": "127.0.0.1:1"}),
        ("CUDA_VISIBLE_DEVICES", "1,0", {"env.CUDA_VISIBLE_DEVICES": "1,0"}),
        ("ALLOW_ENGINE_ARGS", "trust-remote-code", {}),
        ("--trust-remote-code", "", {"vllm.model_config.trust_remote_code": True}),
        (
            "VLLM_ARGS",
            (
                "--seed 7 --block-size=64 --no-enable-prefix-caching --no-enable-chunked-prefill "
                "--kv-cache-dtype fp8 --kv-cache-memory-bytes 1500M --enable-lora --max-loras 2"
            ),
            {
                "vllm.model_config.seed": 7, "vllm.cache_config.block_size": 64,
                "vllm.cache_config.enable_prefix_caching": False, "vllm.scheduler_config.enable_chunked_prefill": False,
                "vllm.cache_config.cache_dtype": "fp8", "vllm.lora_config.max_loras": 2,
                "vllm.cache_config.kv_cache_memory_bytes": 1500 << 20, "env.VLLM_CPU_KVCACHE_SPACE": None,
            },
        ),
        ("VLLM_SOCKET_PATH", "{runtime}/other.sock", {"args.uds": "{runtime}/other.sock"}),
        ("KV_CACHE_BACKEND", "lmcache", {"vllm.kv_transfer_config": None}),
        ("KV_OFFLOAD_SIZE_GB", "1", {"vllm.cache_config.kv_offloading_size": None}),
        ("DRAIN_TIMEOUT_SECONDS", "17", {"args.shutdown_timeout": 17}),
        (
            "MODEL_CACHE_PATH", "{runtime}/c",
            {
                "vllm_env.VLLM_CACHE_ROOT": "{runtime}/c/{version}",
                "env.TRITON_CACHE_DIR": "{runtime}/c/{version}/triton",
                "env.TORCHINDUCTOR_CACHE_DIR": "{runtime}/c/{version}/inductor",
            },
        ),
        ("served_model_name", "other", {"vllm.model_config.served_model_name": "other"}),
        FLOAT,
        ("--tool-call-parser", "pythonic", {"args.tool_call_parser": "pythonic"}),
        ("--enable-auto-tool-choice", "", {"args.enable_auto_tool_choice": True}),
        ("--reasoning-parser", "granite", {"args.reasoning_parser": "granite"}),
        ("--chat-template", "chat_template.jinja", {"args.chat_template": "{toy}/chat_template.jinja"}),
        ("--chat-template-content-format", "string", {"args.chat_template_content_format": "string"}),
        ("--max-num-batched-tokens", "5000", {"vllm.scheduler_config.max_num_batched_tokens": 5000}),
        ("--limit-mm-per-prompt", '{"image": 2}', {"args.limit_mm_per_prompt": {"image": 2}}),
    ],
    "two ranks": [
        *ALWAYS,
        (
            "TENSOR_PARALLEL_SIZE", "2",
            {
                "vllm.parallel_config.tensor_parallel_size": 2, "vllm_env.VLLM_CPU_OMP_THREADS_BIND": "0|1",
                "env.OMP_NUM_THREADS": "1", "worker.cpus": [{0}, {1}],
            },
        ),
        ("AUTO_CONFIG", "on", {"env.VLLM_CPU_KVCACHE_SPACE": "1", "vllm.cache_config.kv_cache_memory_bytes": 1 << 30}),
        ("VLLM_SALT_SECRET", "grains", {"env.XEROTIER_AGENT_VLLM_SALT_SECRET": None}),
        ("max_model_len", "1000", {"vllm.model_config.max_model_len": 1000}),
        FLOAT,
    ],
    "two ranks with a quota of one core": [
        *ALWAYS,
        (
            "TENSOR_PARALLEL_SIZE", "2",
            {
                "vllm.parallel_config.tensor_parallel_size": 2, "vllm_env.VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "env.OMP_NUM_THREADS": "1", "worker.cpus": [{0, 1}, {0, 1}],
            },
        ),
    ],
    "two stages": [
        *WITHOUT_EAGER,  # without the warm-up that belongs to compiling, vLLM's second stage dies of its first request
        ("PIPELINE_PARALLEL_SIZE", "2", {"vllm.parallel_config.pipeline_parallel_size": 2, "worker.cpus": [{0}, {1}]}),
        ("quantization", ONLINE, {"vllm.model_config.quantization": ONLINE}),
    ],
    "ngram": [
        *ALWAYS,
        ("SPECULATIVE_ENABLED", "1", {"args.speculative_config.prompt_lookup_max": 4}),
        ("SPECULATIVE_METHOD", "ngram", {"vllm.speculative_config.method": "ngram"}),
        ("SPECULATIVE_TOKENS", "3", {"vllm.speculative_config.num_speculative_tokens": 3}),
        FLOAT,
    ],
    "draft model": [
        *ALWAYS,
        ("SPECULATIVE_ENABLED", "1", {"vllm.speculative_config.method": "draft_model"}),
        ("SPECULATIVE_MODEL", "{toy}", {"vllm.speculative_config.model": "{toy}"}),
        FLOAT,
    ],
    "unsized": [
        *ALWAYS,
        ("AUTO_CONFIG", "off", {"env.VLLM_CPU_KVCACHE_SPACE": None}),
        ("GPU_MEMORY_UTILIZATION", "0.07", {"vllm.cache_config.gpu_memory_utilization": 0.07}),
        ("VLLM_QUANTIZATION", ONLINE, {"vllm.model_config.quantization": ONLINE}),
        ("task", "embed", {"args.runner": "pooling"}),
    ],
}  # fmt: skip
# What no CPU can show, and why; what vLLM gets then is in the table of tests/engine/test_options.py.
NOT_ON_A_CPU = {
    "KV_OFFLOAD_SIZE_GB=10": "what is offloaded are a GPU's blocks; that a CPU's engine gets nothing is seen here",
    "DISTRIBUTED_BACKEND=ray": "it needs a Ray cluster, and vllm-cpu comes without Ray",
    "KV_CACHE_BACKEND=lmcache": "offloading moves blocks from a GPU to the host; LMCache wants CUDA",
    "SPECULATIVE_METHOD=medusa": "it wants heads trained for the model, and none are published in a Python package",
}
# Of the options that could concern an engine, those that stay with the agent.
STAYS = {
    "ALLOW_UNSAFE_FILES": "of the model cache", "MODEL_CACHE_MAX_SIZE_GB": "of the model cache",
    "MODEL_CACHE_DOWNLOADS": "of the model cache", "VLLM_SALT_SECRET_FILE": "read by the agent",
    "ON_FINAL_ERROR": "how the agent ends",
    "ENGINE_START_STALL_SECONDS": "of the agent's own watch", "ENGINE_HANG_SECONDS": "of the agent's own watch",
}  # fmt: skip
