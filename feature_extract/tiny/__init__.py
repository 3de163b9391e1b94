"""The embedded networks: a small Faster R-CNN, a small wav2vec 2.0 and a small dVAE, so that nothing is downloaded.

They were trained by `python -m feature_extract.tiny.train NAME` on spoken scenes of seed 20000, far from the seeds
users choose, and know nothing else; every output that used them says "tiny". Weights lie in weights/NAME.safetensors,
float16, with their configuration in the file's header.
"""
