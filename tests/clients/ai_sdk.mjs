// These checks use Vercel's AI SDK with `@ai-sdk/openai`, over chat completions, responses and completions.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { KEY, MODEL, QUESTION, runChecks, TOO_LONG } from "./checks.mjs";

const WEATHER = z.object({ city: z.enum(["Paris", "Rome"]), is_warm: z.boolean() });
const SHORT = { prompt: QUESTION, temperature: 0, maxOutputTokens: 20, maxRetries: 0 };
const LONG = { ...SHORT, maxOutputTokens: 200 };

function models(url) {
  const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY });
  return [provider.chat(MODEL), provider.responses(MODEL)];
}

async function text_and_stream(url) {
  for (const model of models(url)) {
    const whole = await generateText({ model, ...SHORT });
    const stream = streamText({ model, ...SHORT });
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert.equal(text, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  }
}

async function structured_output(url) {
  for (const model of models(url)) {
    const output = Output.object({ schema: WEATHER });
    WEATHER.parse((await generateText({ model, ...LONG, output })).output);
    WEATHER.parse(await streamText({ model, ...LONG, output }).output);
  }
}

async function tools_and_results_sent_back(url) {
  for (const model of models(url)) {
    const seen = [];
    const inputSchema = z.object({ city: z.enum(["Paris", "Rome"]) });
    const execute = async ({ city }) => {
      seen.push(city);
      return { degrees: 20 };
    };
    const tools = { get_weather: tool({ description: "Tell the weather.", inputSchema, execute }) };
    const providerOptions = { openai: { parallelToolCalls: false } };
    const ask = { model, ...LONG, tools, toolChoice: "required", stopWhen: stepCountIs(2), providerOptions };
    assert.equal((await generateText(ask)).steps.length, 2); // the second step sends the result of the first back
    assert.equal((await streamText(ask).steps).length, 2);
    assert.ok(seen.length >= 2 && seen.every((city) => ["Paris", "Rome"].includes(city)), `${seen}`);
  }
}

async function completion(url) {
  const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY }).completion(MODEL);
  assert.equal(typeof (await generateText({ model, ...SHORT })).text, "string");
}

async function errors(url) {
  for (const model of models(url)) {
    await assert.rejects(generateText({ model, ...SHORT, prompt: TOO_LONG }), (error) => {
      assert.ok(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, 400);
      assert.equal(error.data.error.code, "context_length_exceeded");
      return true;
    });
  }
}

await runChecks(text_and_stream, structured_output, tools_and_results_sent_back, completion, errors);
