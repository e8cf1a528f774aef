from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding


class Qwen3VLTextEmbedding(GPTEmbedding):
    pass
