// One call by OpenAI's client for Node: node client.mjs BASE_URL KEY MODEL PROMPT WAY AGENT; prints what it heard as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model, prompt, way, agent] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, defaultHeaders: { "x-lightning-agent": agent } });
const messages = [{ role: "user", content: prompt }];
let heard = { text: "", reasoning: "" };

if (way === "chat") {
  const answer = await client.chat.completions.create({ model, messages });
  const { content, reasoning } = answer.choices[0].message;
  heard = { text: content, reasoning, used: answer.usage.completion_tokens, raw: answer };
} else if (way === "chat-stream") {
  const stream_options = { include_usage: true };
  heard.raw = [];
  for await (const chunk of await client.chat.completions.create({ model, messages, stream: true, stream_options })) {
    heard.text += chunk.choices[0]?.delta.content ?? "";
    heard.reasoning += chunk.choices[0]?.delta.reasoning ?? "";
    heard.used = chunk.usage?.completion_tokens ?? heard.used;
    heard.raw.push(chunk);
  }
} else {
  heard.raw = [];
  for await (const event of await client.responses.create({ model, input: prompt, stream: true })) {
    if (event.type === "response.output_text.delta") heard.text += event.delta;
    if (event.type === "response.reasoning_text.delta") heard.reasoning += event.delta;
    if (event.type === "response.completed") heard.used = event.response.usage.output_tokens;
    heard.raw.push(event);
  }
}
console.log(JSON.stringify(heard));
