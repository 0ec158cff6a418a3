// The models that this server runs.

import { call } from "./api.js";
import { at, attempt, element } from "./dom.js";
import { signIn } from "./signing-in.js";

attempt(async () => {
  await signIn();
  const models = await call("GET", "/v1/models");
  at("models").replaceChildren(
    ...models.results.map((model) =>
      element("li", {}, element("strong", { textContent: `${model.owner}/${model.name}` }), ` ${model.description}`),
    ),
  );
});
