// Every feature through the official npm client. Run by test_openai_npm.py with
// OPENAI_FOLDER (where the client is installed), SERVER_URL, TOOLS_URL (a model with tools) and MODEL.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const { OPENAI_FOLDER, SERVER_URL, TOOLS_URL, MODEL } = process.env;
const { default: OpenAI, ...errors } = createRequire(`${OPENAI_FOLDER}/`)("openai");
const options = { apiKey: "unused", maxRetries: 0, timeout: 120_000 };
const client = new OpenAI({ ...options, baseURL: `${SERVER_URL}/v1` });
const toolsClient = new OpenAI({ ...options, baseURL: `${TOOLS_URL}/v1` });

const question = [{ role: "user", content: "def make_tiny_model" }];
const chat = (more = {}) =>
  client.chat.completions.create({ model: MODEL, messages: question, max_tokens: 8, temperature: 0, ...more });
const complete = (more = {}) =>
  client.completions.create({ model: MODEL, prompt: "import os", max_tokens: 8, temperature: 0, ...more });
const text = async (more) => (await complete(more)).choices[0].text;
const gather = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};

test("the model is listed", async () => {
  const models = await client.models.list();
  assert.deepEqual(models.data.map((model) => model.id), [MODEL]);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});

test("chat answers and counts tokens", async () => {
  const reply = await chat();
  assert.equal(reply.choices[0].message.role, "assistant");
  assert.equal(reply.choices[0].finish_reason, "length");
  assert.equal(reply.usage.completion_tokens, 8);
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + 8);
  const renamed = await chat({ max_tokens: undefined, max_completion_tokens: 5 });
  assert.equal(renamed.usage.completion_tokens, 5);
});

test("a stream adds up to the whole, with usage", async () => {
  const whole = (await chat({ max_tokens: 40 })).choices[0].message.content;
  const chunks = await gather(await chat({ max_tokens: 40, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(chunks.flatMap((c) => c.choices).map((c) => c.delta.content ?? "").join(""), whole);
  assert.equal(chunks.flatMap((c) => c.choices).at(-1).finish_reason, "length");
  assert.equal(chunks.at(-1).usage.completion_tokens, 40);
});

test("the client's stream helper gathers the message", async () => {
  const whole = (await chat()).choices[0].message.content;
  const stream = client.chat.completions.stream({ model: MODEL, messages: question, max_tokens: 8, temperature: 0 });
  assert.equal(await stream.finalContent(), whole);
});

test("completions stream too", async () => {
  const chunks = await gather(await complete({ max_tokens: 30, stream: true }));
  assert.equal(chunks.map((c) => c.choices[0].text).join(""), await text({ max_tokens: 30 }));
  assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
});

test("seeds repeat", async () => {
  const seeded = (seed) => text({ temperature: 1.5, top_p: 0.95, seed, max_tokens: 24 });
  assert.equal(await seeded(1), await seeded(1));
  assert.notEqual(await seeded(1), await seeded(2));
});

test("top_k and min_p of 1 leave the likeliest token", async () => {
  assert.equal(await text({ temperature: 2, top_k: 1 }), await text());
  assert.equal(await text({ temperature: 2, min_p: 1 }), await text());
});

test("several choices and several prompts", async () => {
  const reply = await complete({ temperature: 1.5, seed: 3, n: 3 });
  assert.deepEqual(reply.choices.map((choice) => choice.index), [0, 1, 2]);
  assert.equal(new Set(reply.choices.map((choice) => choice.text)).size, 3);
  const two = await complete({ prompt: ["import os", "from pathlib"] });
  assert.equal(two.choices[0].text, await text());
});

test("a stop string ends the text before itself", async () => {
  const whole = await text({ max_tokens: 40 });
  const stop = whole.slice(10, 13);
  const reply = await complete({ max_tokens: 40, stop });
  assert.equal(reply.choices[0].text, whole.slice(0, whole.indexOf(stop)));
  assert.equal(reply.choices[0].finish_reason, "stop");
  const chunks = await gather(await complete({ max_tokens: 40, stop, stream: true }));
  assert.equal(chunks.map((c) => c.choices[0].text).join(""), reply.choices[0].text);
});

test("logit_bias forces and a presence penalty breaks repetition", async () => {
  const forced = { logit_bias: { 77: 100, 78: 99 }, max_tokens: 2, logprobs: 0 };
  const plain = (await complete(forced)).choices[0].logprobs.tokens;
  const penalised = (await complete({ ...forced, presence_penalty: 2, frequency_penalty: 1 })).choices[0].logprobs.tokens;
  assert.equal(plain[0], plain[1]);
  assert.notEqual(penalised[0], penalised[1]);
});

test("chat logprobs are of the shown tokens", async () => {
  const reply = await chat({ logprobs: true, top_logprobs: 3, max_tokens: 5 });
  const entries = reply.choices[0].logprobs.content;
  assert.equal(entries.length, 5);
  for (const entry of entries) {
    assert.equal(entry.top_logprobs.length, 3);
    assert.equal(entry.logprob, entry.top_logprobs[0].logprob);
  }
});

test("echo scores the prompt", async () => {
  const reply = await complete({ prompt: [40, 41, 42, 43], echo: true, logprobs: 2, max_tokens: 1 });
  const scores = reply.choices[0].logprobs;
  assert.equal(scores.token_logprobs.length, 5);
  assert.equal(scores.token_logprobs[0], null);
});

test("JSON and a JSON schema are obeyed", async () => {
  const schema = {
    type: "object",
    properties: { name: { enum: ["Ann", "Bob"] }, old: { type: "boolean" } },
    required: ["name", "old"],
    additionalProperties: false,
  };
  const form = { type: "json_schema", json_schema: { name: "person", schema } };
  const person = JSON.parse((await chat({ response_format: form, max_tokens: 100 })).choices[0].message.content);
  assert.ok(["Ann", "Bob"].includes(person.name));
  const any = (await chat({ response_format: { type: "json_object" }, max_tokens: 200, seed: 5 })).choices[0];
  if (any.finish_reason === "stop") assert.equal(typeof JSON.parse(any.message.content), "object");
});

test("a tool that must be called is called by its schema", async () => {
  const parameters = {
    type: "object",
    properties: { city: { enum: ["Oslo", "Rome"] } },
    required: ["city"],
    additionalProperties: false,
  };
  const request = {
    model: MODEL,
    messages: [{ role: "user", content: "How is the weather in Oslo?" }],
    tools: [{ type: "function", function: { name: "weather", parameters } }],
    tool_choice: "required",
    max_tokens: 120,
  };
  const { choices } = await toolsClient.chat.completions.create(request);
  assert.equal(choices[0].finish_reason, "tool_calls");
  const [call] = choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  assert.ok(["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).city));
  const streamed = await toolsClient.chat.completions.stream(request).finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.name, "weather");
});

test("responses, whole and streamed", async () => {
  const request = { model: MODEL, input: "hello", instructions: "Be brief.", max_output_tokens: 6, temperature: 0 };
  const reply = await client.responses.create(request);
  assert.equal(reply.usage.output_tokens, 6);
  const events = await gather(await client.responses.create({ ...request, stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), reply.output_text);
  assert.equal(events.at(-1).response.output_text ?? reply.output_text, reply.output_text);
});

test("text to tokens and back", async () => {
  const { tokens, count } = await client.post("/../tokenize", { body: { prompt: "def f(x): return 12" } });
  assert.equal(count, tokens.length);
  const back = await client.post("/../detokenize", { body: { tokens } });
  assert.equal(back.prompt, "def f(x): return 12");
});

test("leaving a stream early leaves the server well", async () => {
  const stream = await complete({ max_tokens: 300, ignore_eos: true, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    break;
  }
  assert.equal((await complete({ max_tokens: 2, ignore_eos: true })).usage.completion_tokens, 2);
});

for (const [more, kind, words] of [
  [{ model: "gpt-99" }, "NotFoundError", "not served here"],
  [{ temperature: -1 }, "BadRequestError", "temperature"],
  [{ messages: [] }, "BadRequestError", "messages"],
  [{ messages: [{ role: "user", content: "word ".repeat(900) }] }, "BadRequestError", "shorten"],
  [{ logit_bias: { 99999: 1 } }, "BadRequestError", "token id"],
]) {
  test(`an error says what to change: ${words}`, async () => {
    await assert.rejects(chat(more), (error) => {
      assert.ok(error instanceof errors[kind], String(error));
      assert.match(error.message, new RegExp(words));
      assert.deepEqual(Object.keys(error.error).sort(), ["code", "message", "param", "type"]);
      return true;
    });
  });
}
