"""`kt-vllm bench layer`: one MoE layer in the executor beside what the machine can do at best.
`kt-vllm bench e2e`: a model in real vLLM.

    cli             the command line
    settings        what is measured, checked
    random_weights  valid random blocks of every GGML type
    machine         CPU, caches, memory, and the measured limits
    layer           the layer: loaded, routed, timed, compared with float32
    report          the results as a table
    e2e             a model in vLLM: the command line, prefill and decode timed
    e2e_clock       the executor's time, read where the model is
    e2e_report      the results as tables
    trace           a decode step on the device, by torch's profiler

Nothing but e2e* needs vLLM or torch.
"""
