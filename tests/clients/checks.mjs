// `runChecks` runs the checks of one JavaScript client and prints a JSON line for each, as checks.py does in Python.

import assert from "node:assert/strict";

export const MODEL = "demo";
export const KEY = "any"; // the server asks for no key, but clients insist on one
export const QUESTION = "How warm is it in Paris?";
export const TOO_LONG = "word ".repeat(300_000); // more tokens than the demo model's context
export const WEATHER_SCHEMA = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 7 } },
  required: ["city", "days"],
  additionalProperties: false,
};

export function checkWeather(values) {
  assert.ok(["Paris", "Rome"].includes(values.city), JSON.stringify(values));
  assert.ok(values.days >= 1 && values.days <= 7, JSON.stringify(values));
}

export async function runChecks(...checks) {
  for (const check of checks) {
    let error = null;
    try {
      await check(process.argv[2]);
    } catch (raised) {
      console.error(raised);
      error = `${raised?.name}: ${raised?.message}`;
      process.exitCode = 1;
    }
    console.log(JSON.stringify({ check: check.name, error }));
  }
}
