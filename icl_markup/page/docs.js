// The OpenAPI description as a page: each route with its parameters, body and answers.

import { ask, element, Refused } from "./api.js";

/** Follow references and write a schema as a person reads it, fields with their types and limits. */
function written(schema, all, indent = "") {
  if (schema.$ref) return written(all[schema.$ref.split("/").pop()], all, indent);
  if (schema.anyOf) return schema.anyOf.map((one) => written(one, all, indent)).join(" or ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `[${written(schema.items, all, indent)}, …]${limits(schema, "Items")}`;
  if (schema.additionalProperties?.type) return `{"…": ${written(schema.additionalProperties, all, indent)}}`;
  if (schema.properties) {
    const deeper = `${indent}  `;
    const fields = Object.entries(schema.properties).map(([name, field]) => {
      const optional = schema.required?.includes(name) ? "" : "   (optional)";
      return `${deeper}"${name}": ${written(field, all, deeper)}${optional}`;
    });
    return `{\n${fields.join(",\n")}\n${indent}}`;
  }
  return `${schema.type ?? "any"}${limits(schema, "Length")}`;
}

function limits(schema, what) {
  const least = schema[`min${what}`];
  const most = schema[`max${what}`];
  if (least === undefined && most === undefined) return "";
  const unit = what === "Items" ? "items" : "characters";
  return ` (${least === undefined ? "at most" : `${least} to`} ${most === undefined ? "any number of" : most} ${unit})`;
}

function route(path, method, operation, all) {
  const parts = [
    element("h2", {}, element("span", { class: "method" }, method.toUpperCase()), " ", path),
    element("p", {}, operation.description ?? operation.summary ?? ""),
  ];
  for (const one of operation.parameters ?? []) {
    parts.push(element("p", { class: "hint" }, `${one.in}: ${one.name}${one.description ? `, ${one.description}` : ""}`));
  }
  const body = operation.requestBody?.content["application/json"]?.schema;
  if (body) parts.push(element("h3", {}, "Body"), element("pre", { tabindex: "0" }, written(body, all)));
  const found = operation.responses["200"]?.content?.["application/json"]?.schema;
  if (found?.$ref) parts.push(element("h3", {}, "Answer"), element("pre", { tabindex: "0" }, written(found, all)));
  const errors = Object.entries(operation.responses).filter(([code]) => code >= "400");
  if (errors.length) {
    const list = errors.flatMap(([code, one]) => [element("dt", {}, code), element("dd", {}, one.description)]);
    parts.push(element("h3", {}, "Errors"), element("dl", {}, ...list));
  }
  return element("section", { class: "panel route" }, ...parts);
}

try {
  const api = await ask("GET", "/openapi.json");
  const all = api.components?.schemas ?? {};
  const routes = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => route(path, method, operation, all)),
  );
  document.getElementById("routes").append(...routes);
  document.getElementById("state").textContent = api.info.description;
} catch (error) {
  if (!(error instanceof Refused)) throw error;
  document.getElementById("state").textContent = error.message;
}
