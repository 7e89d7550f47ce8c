import { bytes, cell, empty, make, table } from "/dashboard/core.js";

export const title = "Models";

function modelRow(model) {
  const row = make("tr");
  cell(row, "Model", model.name).append(make("small", model.task));
  cell(row, "Revision", model.revision);
  cell(row, "Size", bytes(model.size_bytes), "number");
  cell(row, "Stored", bytes(model.stored_bytes), "number");
  cell(row, "Served by", `${model.serving} agent${model.serving === 1 ? "" : "s"}`, "number");
  return row;
}

export function show(main) {
  const models = table("Models", ["Model", "Revision", "Size", "Stored", "Served by"]);
  const nothing = empty("No model is published yet. Publish one and assign it:",
    "xerotier-xim-agent router model publish PATH --name NAME --data DIR\nxerotier-xim-agent router assign NAME --data DIR");
  models.box.hidden = nothing.hidden = true;
  main.append(make("h1", title), models.box, nothing);
  return {
    update(data) {
      models.body.replaceChildren(...data.models.map(modelRow));
      models.box.hidden = data.models.length === 0;
      nothing.hidden = data.models.length > 0;
    },
    close() {},
  };
}
