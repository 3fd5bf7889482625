// These checks use the `openai` client of JavaScript: chats, streams, tools, structured output, responses and errors.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { checkWeather, KEY, MODEL, QUESTION, runChecks, TOO_LONG, WEATHER_SCHEMA } from "./checks.mjs";

const USER = { role: "user", content: QUESTION };
const ASK = { model: MODEL, messages: [USER], temperature: 0, max_tokens: 20 };
const FUNCTION = { name: "get_weather", parameters: WEATHER_SCHEMA, strict: true };
const TOOLS = { tools: [{ type: "function", function: FUNCTION }] };
const CALL = { ...ASK, ...TOOLS, tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };
const WEATHER = z.object({ city: z.enum(["Paris", "Rome"]), is_warm: z.boolean() });

const client = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 });

async function chat_and_stream(url) {
  const whole = await client(url).chat.completions.create(ASK);
  const chunks = [];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client(url).chat.completions.create({ ...ASK, ...options })) chunks.push(chunk);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
}

async function send_back(url, message) {
  const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "20 degrees" }));
  await client(url).chat.completions.create({ ...ASK, ...TOOLS, messages: [USER, message, ...results] });
}

async function tools_and_results_sent_back(url) {
  const { message } = (await client(url).chat.completions.create(CALL)).choices[0];
  checkWeather(JSON.parse(message.tool_calls[0].function.arguments));
  await send_back(url, message);
}

async function stream_helper_and_its_message_sent_back(url) {
  const message = await client(url).chat.completions.stream(CALL).finalMessage();
  checkWeather(message.tool_calls[0].function.parsed_arguments);
  await send_back(url, message);
}

async function tool_runner(url) {
  const cities = [];
  const tool = {
    type: "function",
    function: {
      ...FUNCTION,
      parse: JSON.parse,
      function: (values) => {
        cities.push(values.city);
        return "20 degrees";
      },
    },
  };
  const runner = client(url).chat.completions.runTools({ ...CALL, tools: [tool] }, { maxChatCompletions: 2 });
  await runner.done();
  assert.ok(["Paris", "Rome"].includes(cities[0]), `${cities}`);
}

async function parse_and_its_message_sent_back(url) {
  const response_format = zodResponseFormat(WEATHER, "weather");
  const answer = await client(url).chat.completions.parse({ ...ASK, max_tokens: 200, response_format });
  const { message } = answer.choices[0];
  WEATHER.parse(message.parsed);
  await client(url).chat.completions.create({ ...ASK, messages: [USER, message, USER] });
}

async function logprobs(url) {
  const answer = await client(url).chat.completions.create({ ...ASK, logprobs: true, top_logprobs: 2 });
  assert.equal(answer.choices[0].logprobs.content.length, answer.usage.completion_tokens);
}

async function errors(url) {
  for (const [kind, code, changes] of [
    [OpenAI.BadRequestError, "context_length_exceeded", { messages: [{ role: "user", content: TOO_LONG }] }],
    [OpenAI.NotFoundError, "model_not_found", { model: "another" }],
    [OpenAI.BadRequestError, "unknown_parameter", { temprature: 1 }],
  ]) {
    await assert.rejects(client(url).chat.completions.create({ ...ASK, ...changes }), (error) => {
      assert.ok(error instanceof kind, `${error}`);
      assert.equal(error.code, code);
      return true;
    });
  }
}

async function responses(url) {
  const ask = { model: MODEL, input: QUESTION, temperature: 0, max_output_tokens: 200 };
  const text = { format: zodTextFormat(WEATHER, "weather") };
  const parsed = await client(url).responses.parse({ ...ask, text });
  WEATHER.parse(parsed.output_parsed);
  const streamed = await client(url).responses.stream({ ...ask, text }).finalResponse();
  assert.deepEqual(streamed.output_parsed, parsed.output_parsed);
  const next = { ...ask, max_output_tokens: 16, previous_response_id: parsed.id };
  assert.equal((await client(url).responses.create(next)).previous_response_id, parsed.id);
}

async function responses_tools_and_results_sent_back(url) {
  const tools = [{ type: "function", ...FUNCTION }];
  const ask = { model: MODEL, temperature: 0, tools, max_output_tokens: 200, parallel_tool_calls: false };
  const answer = await client(url).responses.create({ ...ask, input: [USER], tool_choice: "required" });
  const calls = answer.output.filter((item) => item.type === "function_call");
  checkWeather(JSON.parse(calls[0].arguments));
  const results = calls.map(({ call_id }) => ({ type: "function_call_output", call_id, output: "20 degrees" }));
  await client(url).responses.create({ ...ask, max_output_tokens: 16, input: [USER, ...answer.output, ...results] });
}

await runChecks(
  chat_and_stream,
  tools_and_results_sent_back,
  stream_helper_and_its_message_sent_back,
  tool_runner,
  parse_and_its_message_sent_back,
  logprobs,
  errors,
  responses,
  responses_tools_and_results_sent_back,
);
