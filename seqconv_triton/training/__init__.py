"""Training: the demo on handwritten digits and the parts it is made of. Not imported by `import seqconv_triton`."""
