"""What starts a release and keeps it running: interpreters, model servers, replicas.

`inspection` looks at a model before it is registered, `model_server` serves one over HTTP,
`process` and `endpoint` are the runtimes, `environments` builds the interpreter that a lock asks
for. `model_host` is the one file that runs in that other interpreter and imports nothing of ours.
"""
