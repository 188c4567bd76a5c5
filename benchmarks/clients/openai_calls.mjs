// What the `openai` client for Node gets from a server: node openai_calls.mjs URL MODEL FOLDER (of node_modules)
// Prints a JSON object: the client's version, and each call that was made with what came of it.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [url, model, folder] = process.argv.slice(2);
const require = createRequire(join(folder, "package.json"));
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai").replace(/\.js$/, ".mjs")));
const version = JSON.parse(readFileSync(join(folder, "node_modules", "openai", "package.json"), "utf8")).version;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "你好" }];
const asked = { model, messages, max_tokens: 16, temperature: 0 };
const parameters = { type: "object", properties: { x: { type: "integer" } }, required: ["x"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "add", description: "Adds 1.", parameters } }];
const schema = { type: "object", properties: { ok: { enum: ["yes", "no"] } }, required: ["ok"], additionalProperties: false };
const form = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
const forced = { model, messages, tools, tool_choice: "required", temperature: 0, max_tokens: 200 };

const calls = {
  models: async () => (await client.models.list()).data.some((one) => one.id === model),
  chat: async () => (await client.chat.completions.create(asked)).usage.completion_tokens > 0,
  "chat streamed": async () => {
    const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    return text === whole;
  },
  completions: async () =>
    (await client.completions.create({ model, prompt: "Hi", max_tokens: 4, temperature: 0 })).choices[0].text.length > 0,
  embeddings: async () => (await client.embeddings.create({ model, input: ["a", "b"] })).data.length === 2,
  responses: async () => {
    const whole = await client.responses.create({ model, input: "Hi", max_output_tokens: 8, temperature: 0 });
    let text = "";
    const stream = await client.responses.create({ model, input: "Hi", max_output_tokens: 8, temperature: 0, stream: true });
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    return text.length > 0 && text === whole.output_text;
  },
  tools: async () => {
    const choice = (await client.chat.completions.create(forced)).choices[0];
    const call = choice.message.tool_calls[0];
    return call.function.name === "add" && Number.isInteger(JSON.parse(call.function.arguments).x);
  },
  "tools streamed": async () => {
    const final = await client.chat.completions.stream(forced).finalChatCompletion();
    const call = final.choices[0].message.tool_calls[0];
    return call.function.name === "add" && Number.isInteger(JSON.parse(call.function.arguments).x);
  },
  "tools, the answer of one": async () => {
    const { message } = (await client.chat.completions.create(forced)).choices[0];
    const told = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "2" };
    const next = { ...asked, messages: [...messages, message, told], tools };
    return (await client.chat.completions.create(next)).choices.length === 1;
  },
  json_schema: async () => {
    const answer = await client.chat.completions.create({ ...asked, response_format: form, max_tokens: 60 });
    return ["yes", "no"].includes(JSON.parse(answer.choices[0].message.content).ok);
  },
  "json_schema parsed": async () => {
    const answer = await client.chat.completions.parse({ ...asked, response_format: form, max_tokens: 60 });
    return answer.choices[0].finish_reason === "stop";
  },
  "error of an unknown model": async () => {
    try {
      await client.chat.completions.create({ ...asked, model: "gpt-4" });
    } catch (error) {
      return error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
    }
  },
};

const found = {};
for (const [name, call] of Object.entries(calls)) {
  try {
    found[name] = (await call()) === true ? "ok" : "another answer than expected";
  } catch (error) {
    found[name] = `${error.constructor.name}: ${error.message}`.slice(0, 300);
  }
}
console.log(JSON.stringify({ version, calls: found }));
