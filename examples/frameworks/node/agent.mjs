// A loop over chat completions and a tool; the client finds endpoint and key in OPENAI_BASE_URL and OPENAI_API_KEY.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const city = process.argv[2];
const weather = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI();
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const messages = [{ role: "user", content: `What is the weather like in ${city}?` }];

for (;;) {
  const answer = await client.chat.completions.create({ model: process.env.OPENAI_MODEL, messages, tools });
  const { message } = answer.choices[0];
  messages.push(message);
  if (!message.tool_calls?.length) break;
  for (const call of message.tool_calls) {
    const content = weather[JSON.parse(call.function.arguments).city] ?? "unknown";
    messages.push({ role: "tool", tool_call_id: call.id, content });
  }
}
console.log(messages.at(-1).content);
