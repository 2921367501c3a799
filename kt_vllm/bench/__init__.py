"""`kt-vllm bench layer`: one MoE layer in the executor beside what the machine can do at best.

    cli             the command line
    settings        what is measured, checked
    random_weights  valid random blocks of every GGML type
    machine         CPU, caches, memory, and the measured limits
    layer           the layer: loaded, routed, timed, compared with float32
    report          the results as a table

Nothing here needs vLLM or torch.
"""
