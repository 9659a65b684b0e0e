"""Language models behind an HTTP API, in the place of a model of one's own."""

from etpo.engine.agents.openai import AgentError, OpenAIAgent, Reply, agent_of

__all__ = ["AgentError", "OpenAIAgent", "Reply", "agent_of"]
