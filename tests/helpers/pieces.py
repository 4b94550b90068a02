"""A small SentencePiece model of Llama's kind, trained in a moment."""

from pathlib import Path


def train_bpe(
    prefix,  # path of the .model to make, without its ending
    lines,  # texts to train on
    size,  # pieces
    **changes,  # settings of SentencePiece's trainer
):
    "BPE with byte fallback, spaces as they are; gives the path of the model"
    import sentencepiece

    settings = dict(
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=size,
        **settings | changes,
    )
    return Path(f'{prefix}.model')
