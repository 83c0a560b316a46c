"""AUTOMATIC1111's API over the same validated requests and the same jobs as OpenAI's."""
