"""The Gemma 4 decoder, its Keras model, adapters, quantization, names and loading."""
