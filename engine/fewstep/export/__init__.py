"""Taking an artefact to other runtimes: one ONNX graph, a TensorRT engine, and the check that they agree."""
