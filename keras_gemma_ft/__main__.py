"""`python -m keras_gemma_ft VERB …`: the command line."""

from keras_gemma_ft.cli import run

if __name__ == "__main__":
    run()
