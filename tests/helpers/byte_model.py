"""A random Llama whose tokens are bytes: every letter is one piece, without a space before it."""

import torch


def byte_model(positions=1024):
    "(model in eval mode, tokenizer) that reads `positions` tokens"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {c: i for i, c in enumerate(['<s>', '</s>', *alphabet])}
    t = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>')
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), tok
